"""How much faster two processes are than one: the calibration pass divided by text, and the solving of layers divided by layers.

    python benchmarks/divide.py [--model nano] [--tokens 16384] [--processes 2] [--turns 3] [--json]

Every process has one thread, and has imported everything before a time begins. One process alone and all of them together take turns; a
time is from the moment when all begin to the moment when the last one ends, and the least of the turns counts. `joining` is what adding
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
from typing import Any

import torch

from moe_prism.jobs.calibrate import calibrate_model, calibrate_part
from moe_prism.jobs.join_calibrations import join_calibrations
from moe_prism.jobs.refactor import refactor_shard
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.refactor import RefactorOptions


def work(kind: str, number: int, count: int, folder: Path, asked: argparse.Namespace, gate: Any, ends: Any) -> None:
    """One process: a part of the text, or of the layers."""
    torch.set_num_threads(1)
    options = CalibrateOptions(text="stdlib", tokens=asked.tokens)
    out = folder / f"{kind}-{number}-of-{count}"
    refactoring = RefactorOptions(calibration=options, profile_tokens=0)
    gate.wait()
    began = time.monotonic()
    if kind == "calibrate":
        calibrate_part(asked.model, out, f"{number + 1}/{count}", options, force=True)
    else:
        refactor_shard(asked.model, out, f"{number + 1}/{count}", refactoring, calibration=folder / "statistics", force=True)
    ends.put((began, time.monotonic()))


def seconds(kind: str, count: int, folder: Path, asked: argparse.Namespace) -> float:
    context = multiprocessing.get_context("spawn")
    gate, ends = context.Barrier(count), context.Queue()
    own = [context.Process(target=work, args=(kind, i, count, folder, asked, gate, ends)) for i in range(count)]
    for process in own:
        process.start()
    found = [ends.get(timeout=1800) for _ in own]
    for process in own:
        process.join()
    return max(end for _, end in found) - min(began for began, _ in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    options, rows = CalibrateOptions(text="stdlib", tokens=asked.tokens), {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        calibrate_model(asked.model, folder / "statistics", options)
        for kind in ("calibrate", "solve"):
            times: dict[int, list[float]] = {1: [], asked.processes: []}
            for _ in range(asked.turns):
                for count, found in times.items():
                    found.append(seconds(kind, count, folder, asked))
            alone, together = (min(times[count]) for count in (1, asked.processes))
            rows[kind] = {"one": round(alone, 2), "all": round(together, 2), "speed-up": round(alone / together, 2)}
        parts = [folder / f"calibrate-{i}-of-{asked.processes}" for i in range(asked.processes)]
        began = time.monotonic()
        join_calibrations(asked.model, folder / "joined", parts, options)
        rows["calibrate"]["joining"] = round(time.monotonic() - began, 2)
    found = [{"what": kind, "processes": asked.processes, **row} for kind, row in rows.items()]
    print(json.dumps(found) if asked.json else "\n".join(map(str, found)))


if __name__ == "__main__":
    main()
