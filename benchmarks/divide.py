"""How much faster two processes are than one: the calibration pass divided by text, and the solving of layers divided by layers.

    python benchmarks/divide.py [--model nano] [--tokens 16384] [--processes 2] [--threads 1] [--turns 3] [--only solve] [--json]

Every process has --threads threads, one by default, for products and for solving, and has imported and compiled everything before a time
begins. One process alone and all of them together take turns; a time is from the moment when all begin to the moment when the last one
ends, and the least of the turns counts. Beside it stands the processor time of the process that took the most: where others use the
machine, the ratio of that is what compares. `both`: one process with all threads that the others have together. `joining` is what adding
up the parts takes then, in one process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_prism.jobs.calibrate import calibrate_model, calibrate_part
from moe_prism.jobs.join_calibrations import join_calibrations
from moe_prism.jobs.refactor import refactor_shard
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.refactor import RefactorOptions

BOTH = " with all threads"
KINDS = ("calibrate", "solve")


class Took(NamedTuple):
    """From the first beginning to the last end, and of processors the most that one process took, in seconds."""

    clock: float
    processor: float


def work(kind: str, number: int, count: int, folder: Path, asked: argparse.Namespace, gate: Any, ends: Any) -> None:
    """One process: a part of the text, or of the layers. Before that it does a small part of both, for nobody."""
    threads = asked.threads * (asked.processes if kind.endswith(BOTH) else 1)
    torch.set_num_threads(threads)
    kind = kind.removesuffix(BOTH)
    few = CalibrateOptions(text="stdlib", tokens=1024, length=256, collectors=["counts", "tokens"])
    spare = folder / f"spare-{number}"
    calibrate_model(asked.model, spare, few, force=True)
    refactor_shard(
        asked.model,
        folder / f"none-{number}",
        "1/6",
        RefactorOptions(calibration=few, profile_tokens=0),
        calibration=spare,
        force=True,
    )
    options = CalibrateOptions(text="stdlib", tokens=asked.tokens)
    out = folder / f"{kind}-{number}-of-{count}"
    refactoring = RefactorOptions(calibration=options, profile_tokens=0)
    gate.wait()
    began, used = time.monotonic(), time.process_time()
    if kind == "calibrate":
        calibrate_part(asked.model, out, f"{number + 1}/{count}", options, force=True)
    else:
        refactor_shard(asked.model, out, f"{number + 1}/{count}", refactoring, calibration=folder / "statistics", force=True)
    ends.put((began, time.monotonic(), time.process_time() - used))


def seconds(kind: str, count: int, folder: Path, asked: argparse.Namespace) -> Took:
    context = multiprocessing.get_context("spawn")
    gate, ends = context.Barrier(count), context.Queue()
    own = [context.Process(target=work, args=(kind, i, count, folder, asked, gate, ends)) for i in range(count)]
    for process in own:
        process.start()
    found = [ends.get(timeout=1800) for _ in own]
    for process in own:
        process.join()
    return Took(max(end for _, end, _ in found) - min(began for began, _, _ in found), max(used for _, _, used in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=KINDS, help="measure nothing else")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    torch.set_num_threads(asked.threads)
    options = CalibrateOptions(text="stdlib", tokens=asked.tokens)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        calibrate_model(asked.model, folder / "statistics", options)
        for kind in [asked.only] if asked.only else KINDS:
            ways = {"one": (kind, 1), "all": (kind, asked.processes), "both": (kind + BOTH, 1)}
            times: dict[str, list[Took]] = {name: [] for name in ways}
            for _ in range(asked.turns):
                for name, way in ways.items():
                    times[name].append(seconds(*way, folder, asked))
            row: dict[str, Any] = {"what": kind, "processes": asked.processes, "threads": asked.threads}
            for field in Took._fields:
                one, every, both = (min(getattr(took, field) for took in times[name]) for name in ways)
                row[field] = {"one": round(one, 2), "all": round(every, 2), "speed-up": round(one / every, 2)}
                if field == "clock":
                    row[field] |= {"both": round(both, 2), "to both": round(both / every, 2)}
            if kind == "calibrate":
                parts = [folder / f"calibrate-{i}-of-{asked.processes}" for i in range(asked.processes)]
                began = time.monotonic()
                join_calibrations(asked.model, folder / "joined", parts, options)
                row["joining"] = round(time.monotonic() - began, 2)
            rows.append(row)
            if not asked.json:
                print(row, flush=True)
    if asked.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
