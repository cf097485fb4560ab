"""Fitted settings of a store against LRU over whole experts, at links and memories, and how well a fit says what a run will take.

    python benchmarks/offload_grid.py [--folder ELASTIC] [--links 100 1000 10000] [--shares .25 .5] [--tokens 64] [--rounds 2] [--json]
    python benchmarks/offload_grid.py --overlap        # where reading and computing take alike, what both take together
    python benchmarks/offload_grid.py --limits         # --expert-memory auto under three limits of memory

In every cell of the grid: prices and steps are measured on calibration text (`moe-prism offload` does the same), settings are fitted to a
trace of calibration text, and held-out text is decoded with them and with `lru` over whole experts in the same memory, window by window,
A B B A. `forecast` is what the fit said of the trace's evaluation side before anything was run. Settings are tried at full budget, at
--budget, and for records of planes at --bits; the cell has the fastest by its forecast, so no run chooses anything. --links are MB/s.
The limits are files of a made-up control group, which the code reads as it reads the system's: nobody enforces them here, so what counts
is what the process holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from offload import PROMPT, Config, Run, decode, elastic, expert_bytes, fitted, held_out, overlap, stored, turn

from moe_prism import memory
from moe_prism.artefact.load import load
from moe_prism.checkpoint import read_manifest
from moe_prism.cli.output import note
from moe_prism.data import token_windows
from moe_prism.elastic import operating_point
from moe_prism.jobs.fit_offload import OffloadFit, fit_offload
from moe_prism.offload.record import TraceRecorder, record
from moe_prism.offload.trace import Trace
from moe_prism.options.fit import FitOptions
from moe_prism.point import FULL
from moe_prism.store import StoreOptions, sizing
from moe_prism.store.price_reads import measure_prices, measure_step

MIB = 1 << 20
TOKENS = 256  # of the KV cache under a limit


@dataclass
class Way:
    """Settings that were fitted for a cell, and what the fit says a token takes."""

    config: Config
    found: OffloadFit

    @property
    def forecast(self) -> float:
        return self.found.held_out[2].ms_per_token


def routing(folder: Path, model: Any, tokenizer: Any, budget: float, args: Namespace) -> Trace:
    """What both sides of the text route to at a budget."""
    exclude = read_manifest(folder)["calibration"]["documents"]
    length, every = PROMPT + args.tokens, []
    for side, count in (("calibration", 8), ("evaluation", 4)):
        left_out = exclude if side == "evaluation" else ()
        every.append(
            (side, token_windows(tokenizer, args.text, side, length=length, tokens=length * count, exclude=left_out).ids)
        )
    with operating_point(model, budget):
        return record(TraceRecorder(model, inputs=True), every, prompt=PROMPT)


def prices(model: Any, text: torch.Tensor, budget: float) -> tuple[float, float]:
    """Milliseconds that a layer computes and that a record takes where many are read."""
    store = model._moe_prism.store
    found = measure_prices(store)
    with operating_point(model, budget):
        step = measure_step(model, text, PROMPT, found)
    return max(1e-6, 1e3 * step / store.space.layers), max(1e-6, 1e3 / found.bandwidth) if found.seconds[0] else 1e-6


def fit_ways(folder: Path, work: Path, traces: dict[float, Trace], text: torch.Tensor, args: Namespace) -> list[Way]:
    """Settings for every budget."""
    ways = []
    for budget, trace in traces.items():
        name = f"budget {budget:g}"
        model = stored(folder, work, args.memory, Config(name, budget, options={"policy": "lfu"}), args)
        layer, record_ms = prices(model, text, budget)
        store = model._moe_prism.store
        path = work / f"settings-{args.link:g}-{args.share:g}-{budget:g}.json"
        asked = FitOptions(share=min(1.0, store.slots / len(store.space)), layer_ms=layer, record_ms=record_ms)
        found = fit_offload(trace, path, asked, force=True)
        ways.append(Way(Config(name, budget, options={"fitted": path}), found))
        store.close()
        note(f"{args.link:g} MB/s, share {args.share:g}, {name}: layer {layer:.3f} ms, record {record_ms:.4f} ms")
    return ways


def cell(
    folder: Path, work: Path, traces: dict[float, Trace], whole: Any, texts: tuple[Any, Any], args: Namespace
) -> dict[str, Any]:
    """One link and one memory."""
    calibration, windows = texts
    args.memory = int(args.share * expert_bytes(folder, whole))
    ways = fit_ways(folder, work, traces, calibration, args)
    best = min(ways, key=lambda way: way.forecast)
    configs = [Config("lru", parts=1, options={"policy": "lru"}), best.config]
    layers = None
    if args.bits:
        layers = fitted(folder, args.group, None)
        configs.append(Config(f"planes, {args.bits:g}", args.bits, options={"policy": "lfu"}, planes=True))
    runs = [Run(config, stored(folder, work, args.memory, config, args), config.point(layers)) for config in configs]
    for run in runs:
        decode(run.model, windows[-1:], run.point, min(16, args.tokens))
    for row in windows:
        for run in (*runs, *reversed(runs)):
            turn(run, row[None], args.tokens, None)
    rows = [run.row(runs[0]) for run in runs]
    for run in runs:
        run.model._moe_prism.store.close()
    chosen = best.found.settings
    return {
        "link": args.link,
        "share": args.share,
        "lru_ms": rows[0]["ms_per_token"],
        "fitted_ms": rows[1]["ms_per_token"],
        "ratio": rows[1]["ratio"],
        "budget": best.config.budget,
        "policy": chosen.policy,
        "predictor": chosen.predictor if chosen.width else None,
        "width": chosen.width,
        "forecast_ms": best.forecast,
        "error": best.forecast / rows[1]["ms_per_token"] - 1,
        "planes_ratio": rows[2]["ratio"] if args.bits else None,
    }


def grid(args: Namespace, folder: Path, work: Path) -> list[dict[str, Any]]:
    whole, tokenizer = load(folder)
    traces = {budget: routing(folder, whole, tokenizer, budget, args) for budget in (1.0, args.budget)}
    length = PROMPT + args.tokens
    calibration = token_windows(tokenizer, args.text, "calibration", length=length, tokens=length).ids
    texts = calibration, held_out(folder, tokenizer, args)
    rows = []
    for link in args.links:
        for share in args.shares:
            asked = Namespace(**{**vars(args), "link": link, "share": share})
            rows.append(cell(folder, work, traces, whole, texts, asked))
            note(json.dumps(rows[-1]))
    errors = [abs(row["error"]) for row in rows]
    print(
        f"worst ratio {max(row['ratio'] for row in rows):.2f}, error median {statistics.median(errors):.3f}, worst {max(errors):.3f}"
    )
    return rows


def limits(args: Namespace, folder: Path, work: Path) -> list[dict[str, Any]]:
    """`auto` under limits that leave a quarter, a half and all of the experts beside everything else."""
    whole, tokenizer = load(folder)
    experts, windows = expert_bytes(folder, whole), held_out(folder, tokenizer, args)
    beside = sizing.WORK + sizing.cache_bytes(whole, TOKENS)
    del whole
    first, _ = load(folder, store=StoreOptions(experts // 4, work / "auto"))
    decode(first, windows[:1], FULL, args.tokens)
    base = memory.resident_memory() - first._moe_prism.store.arena.bytes
    first._moe_prism.store.close()
    del first
    rows = []
    for share in (0.25, 0.5, 1.0):
        limit = int((base + beside + share * experts) / (1 - sizing.FREE))
        with mock.patch.object(memory, "GROUPS", made_up_group(work / f"group-{share:g}", limit)), live():
            model, _ = load(folder, store=StoreOptions(None, work / "auto", cache_tokens=TOKENS))
            for _ in range(1 + sizing.STEPS // args.tokens):
                decode(model, windows[:1], FULL, args.tokens)
            held = memory.resident_memory()
        store = model._moe_prism.store
        row = {"limit_mib": limit / MIB, "arena_mib": store.in_use * store.pack.layout.bytes / MIB, "held_mib": held / MIB}
        rows.append({**row, "free": 1 - held / limit})
        store.close()
        del model, store
    return rows


def made_up_group(root: Path, limit: int) -> Path:
    """A control group of this limit."""
    root.mkdir()
    (root / "memory.max").write_text(str(limit))
    (root / "memory.current").write_text("0")
    return root


@contextmanager
def live() -> Iterator[None]:
    """What this process holds is what its made-up group uses; the group is the root's."""
    number, text = memory._number, Path.read_text

    def current(file: Path) -> int | None:
        return memory.resident_memory() if file.name == "memory.current" else number(file)

    def own(file: Path, *given: Any, **named: Any) -> str:
        return "0::/\n" if str(file) == "/proc/self/cgroup" else text(file, *given, **named)

    with mock.patch.object(memory, "_number", current), mock.patch.object(Path, "read_text", own):
        yield


def balanced(args: Namespace, folder: Path, work: Path) -> list[dict[str, Any]]:
    """`offload.py --overlap`, of which those rows count where reading and computing are within twice each other."""
    rows = overlap(args, folder, work)
    for row in rows:
        row["counts"] = max(row["read"], row["compute"]) <= 2 * min(row["read"], row["compute"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="an elastic model, instead of refactoring prism-nano")
    parser.add_argument("--work", help="folder for packed files, default a temporary one")
    parser.add_argument("--large", action="store_true", help="random weights, for --overlap")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--limits", action="store_true")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--links", type=float, nargs="+", default=[100.0, 1000.0, 10_000.0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--budget", type=float, default=0.75)
    parser.add_argument("--bits", type=float, default=0.24, help="budget of records of planes; 0: without them")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--low", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.link = 0.0
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        work = Path(temporary)
        folder = elastic(args, work)
        rows = (limits if args.limits else balanced if args.overlap else grid)(args, folder, work)
    if args.json:
        json.dump({"benchmark": "offload_grid", "arguments": vars(args), "rows": rows}, sys.stdout)
    else:
        for row in rows:
            print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
