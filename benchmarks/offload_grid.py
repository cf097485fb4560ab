"""Fitted settings of a store against LRU over whole experts, at links and memories, and how well a run's time is known before it.

    python benchmarks/offload_grid.py [--folder ELASTIC] [--links 100 1000 10000] [--shares .25 .5] [--tokens 64] [--rounds 2] [--json]
    python benchmarks/offload_grid.py --overlap        # where reading and computing take alike, what both take together

In every cell of the grid, prices and steps are measured on calibration text, as `moe-prism offload` does, and settings are fitted to a
trace of calibration text: at full budget, at --budget, and for records of planes at --bits. From that the time of each is forecast, and
that of `lru` over whole experts in the same memory. Then held-out text is decoded with `lru` and with the fastest by its forecast, if
that gains a fifth over the forecast of `lru`: a forecast may err by as much. So no run chooses anything. The best of the other kind
(records for planes, planes for records) runs beside them. All windows are decoded, then all again in the other order of configurations.
KL is to the model in memory, on the same tokens. --links are MB/s, and a share is of the bytes of all experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from offload import PROMPT, Config, Run, decode, elastic, expert_bytes, fitted, held_out, overlap, stored, turn

from moe_prism.artefact.load import load
from moe_prism.checkpoint import read_manifest
from moe_prism.cli.output import note
from moe_prism.data import token_windows
from moe_prism.elastic import operating_point
from moe_prism.jobs.fit_offload import fit_offload
from moe_prism.jobs.forecast_offload import FitPrices, prefetch_of
from moe_prism.jobs.forecast_planes import forecast_planes
from moe_prism.offload.cache import cache_policies
from moe_prism.offload.record import TraceRecorder, record
from moe_prism.offload.replay import groups
from moe_prism.offload.trace import Trace
from moe_prism.options.fit import FitOptions
from moe_prism.point import FULL, SlotBits
from moe_prism.store.decisions import Decisions, measure_guess, measure_uncompiled
from moe_prism.store.fitted import choose
from moe_prism.store.pools import Eviction
from moe_prism.store.price_reads import ReadPrices, measure_prices, measure_step, replayed

MIB = 1 << 20
TOKENS = 256  # of the KV cache under a limit
MARGIN = 0.2  # what a forecast may err by: another way than `lru` has to gain more


@dataclass(frozen=True)
class Costs:
    """What was measured of a store: the price of reads, seconds of a step apart from them, and what deciding costs."""

    prices: ReadPrices
    step: float
    decisions: Decisions


@dataclass(frozen=True)
class Way:
    """A configuration, and the seconds that a token takes with it by what was known before it ran."""

    config: Config
    forecast: float
    about: str = ""


@dataclass(frozen=True)
class Bench:
    """What all cells share. traces: of calibration text, by budget; reference: log-probabilities of every window."""

    folder: Path
    work: Path
    experts: int
    traces: dict[float, Trace]
    calibration: torch.Tensor
    windows: torch.Tensor
    reference: list[torch.Tensor]
    bits: SlotBits | None

    @classmethod
    def of(cls, folder: Path, work: Path, args: Namespace) -> Bench:
        whole, tokenizer = load(folder)
        length = PROMPT + args.tokens
        exclude = read_manifest(folder)["calibration"]["documents"]
        sides = [
            (side, token_windows(tokenizer, args.text, side, length=length, tokens=length * count, exclude=left_out).ids)
            for side, count, left_out in (("calibration", 12, ()), ("evaluation", 2, exclude))
        ]
        traces = {budget: routing(whole, sides, budget) for budget in (1.0, args.budget)}
        windows = held_out(folder, tokenizer, args)
        reference = [decode(whole, row[None], FULL, args.tokens)[1] for row in windows]
        bits = fitted(folder, args.group, None) if args.bits else None
        return cls(folder, work, expert_bytes(folder, whole), traces, sides[0][1], windows, reference, bits)


def routing(model: Any, sides: list[tuple[str, torch.Tensor]], budget: float) -> Trace:
    """What both sides of the text route to at a budget."""
    with operating_point(model, budget):
        return record(TraceRecorder(model, inputs=True), sides, prompt=PROMPT)


def measured(model: Any, text: torch.Tensor, budget: float, fits: bool = True) -> Costs:
    """fits: whether what deciding costs is asked for."""
    store, elastic = model._moe_prism.store, model._moe_prism
    prices = measure_prices(store)
    with operating_point(model, budget):
        step = measure_step(model, text, PROMPT, prices)
        uncompiled = measure_uncompiled(model, text, PROMPT, prices, step) if fits else 0.0
        guess = measure_guess(elastic) if fits else 0.0
        return Costs(prices, step, Decisions(store.space, store.slots, uncompiled, guess))


def lru_way(bench: Bench, args: Namespace) -> Way:
    """Whole experts, all of them: what everything is compared with."""
    config = Config("lru", parts=1, options={"policy": "lru"})
    model = stored(bench.folder, bench.work, args.memory, config, args)
    store, costs = model._moe_prism.store, measured(model, bench.calibration[:3], 1.0, fits=False)
    rows = bench.traces[1.0].part("calibration").decode()
    eviction = Eviction(cache_policies.get("lru"), group=store.group)
    found = replayed(rows, store.space, store.slots, eviction).at(costs.prices, costs.step)
    store.close()
    return Way(config, found.seconds)


def fitted_ways(bench: Bench, args: Namespace) -> list[Way]:
    """Settings for every budget."""
    ways = []
    for budget, trace in bench.traces.items():
        name = f"budget {budget:g}"
        model = stored(bench.folder, bench.work, args.memory, Config(name, budget, options={"policy": "lfu"}), args)
        store, costs = model._moe_prism.store, measured(model, bench.calibration[:3], budget)
        ms = FitPrices.of(costs.prices, costs.step, costs.decisions)
        path = bench.work / f"settings-{args.link:g}-{args.share:g}-{budget:g}.json"
        asked = FitOptions(
            share=min(1.0, store.slots / len(store.space)), layer_ms=max(1e-6, ms.layer), record_ms=max(1e-6, ms.record),
            first_ms=ms.first, busy_ms=ms.busy, uncompiled_ms=ms.uncompiled, guess_ms=ms.guess,
        )  # fmt: skip
        began = time.perf_counter()
        fit_offload(trace, path, asked, force=True)
        took = time.perf_counter() - began
        chosen, rows = choose(None, {}, None, None, path), trace.part("calibration").decode()
        eviction = chosen.eviction(store.space, store.slots, store.group)
        ahead, guess = prefetch_of(chosen, rows, store)
        work = list(groups(rows, store.space))
        deciding = costs.decisions.policy(eviction, work) + (0.0 if guess is None else costs.decisions.predictor(guess, rows))
        found = replayed(work, store.space, store.slots, eviction, ahead).at(costs.prices, costs.step).with_deciding(deciding)
        about = chosen.policy if ahead is None else f"{chosen.policy}, {chosen.predictor} {chosen.width}"
        ways.append(Way(Config(name, budget, options={"fitted": path}), found.seconds, str(about)))
        store.close()
        told = ", ".join(f"{field} {value:.4f}" for field, value in ms._asdict().items())
        note(
            f"{args.link:g} MB/s, {args.share:g}, {name}: {told} ms; fitted in {took:.0f} s: {about}, deciding {1e3 * deciding:.2f} ms"
        )
    return ways


def planes_way(bench: Bench, args: Namespace) -> Way:
    """Records of planes at --bits, under the policy that has the shortest forecast."""
    config = Config(f"bits {args.bits:g}", args.bits, options={"policy": "lfu"}, planes=True)
    model = stored(bench.folder, bench.work, args.memory, config, args)
    policies = {name: Eviction(cache_policies.get(name)) for name in ("lru", "lfu", "d2moe", "edge-moe")}
    found = forecast_planes(model, bench.calibration, PROMPT, policies, {config.name: config.point(bench.bits)}, 0.0)[1]
    best = min(found, key=lambda way: way.found.seconds)
    model._moe_prism.store.close()
    return Way(replace(config, options={"policy": best.policy}), best.found.seconds, best.policy)


def cell(bench: Bench, args: Namespace) -> list[dict[str, Any]]:
    """One link and one memory: a row per configuration that ran, `chosen` the fastest by its forecast."""
    args.memory = int(args.share * bench.experts)
    records = min(fitted_ways(bench, args), key=lambda way: way.forecast)
    ways = [lru_way(bench, args), records, *([planes_way(bench, args)] if args.bits else [])]
    chosen = min(ways, key=lambda way: way.forecast * (1 if way is ways[0] else 1 + MARGIN))
    runs = []
    for way in ways:
        model = stored(bench.folder, bench.work, args.memory, way.config, args)
        runs.append(Run(way.config, model, way.config.point(bench.bits)))
        decode(model, bench.windows[-1:], runs[-1].point, args.tokens)
    for order in (runs, runs[::-1]):  # a window comes again behind all others, or its records would still be there
        for row, reference in zip(bench.windows, bench.reference, strict=True):
            for run in order:
                turn(run, row[None], args.tokens, reference)
    rows = []
    for way, run in zip(ways, runs, strict=True):
        own = run.row(runs[0])
        error = 1e3 * way.forecast / own["ms_per_token"] - 1
        names = {"link": args.link, "share": args.share, "config": way.config.name, "about": way.about, "chosen": way is chosen}
        figures = {name: own[name] for name in ("ms_per_token", "ratio", "kl", "hit_rate", "waited_ms")}
        rows.append({**names, **figures, "forecast_ms": 1e3 * way.forecast, "error": error})
        run.model._moe_prism.store.close()
    return rows


def grid(args: Namespace, folder: Path, work: Path) -> list[dict[str, Any]]:
    bench, rows = Bench.of(folder, work, args), []
    for link in args.links:
        for share in args.shares:
            found = cell(bench, Namespace(**{**vars(args), "link": link, "share": share}))
            rows += found
            for row in found:
                note(json.dumps(row))
    errors = [abs(row["error"]) for row in rows]
    worst = max(row["ratio"] for row in rows if row["chosen"])
    note(f"worst ratio {worst:.2f}, error median {statistics.median(errors):.3f}, worst {max(errors):.3f}")
    return rows


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
        rows = (balanced if args.overlap else grid)(args, folder, work)
    if args.json:
        json.dump({"benchmark": "offload_grid", "arguments": vars(args), "rows": rows}, sys.stdout)
    else:
        for row in rows:
            print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
