"""Time of nano end to end at budgets, as a ratio to its full budget; and beside one busy process per core, as a ratio to alone.

    python benchmarks/decode.py FOLDER [--batches 1,8,32] [--budgets .75,.5,.25] [--rounds 5] [--new 24] [--isa avx2]
    python benchmarks/decode.py FOLDER --beside [--rounds 3]

FOLDER: of `moe-prism refactor nano`. Budgets take turns, A B C D A B C D; a figure is the median over rounds of a round's ratio. The clock is the processor time of one thread,
which a busy machine disturbs less than the clock on the wall.

`--beside` times one forward of 1,024 tokens and 16 decoding steps in processes of their own, on the wall: alone and beside busy processes,
with the waiting of threads as OpenMP has it and as the commands set it. Their rounds take turns too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from isa import SWITCHES, run_as

WORKER = "--worker"
BUSY = "while True: pass"


def generate_times(folder: str, batches: list[int], budgets: list[float], rounds: int, new: int) -> list[dict[str, Any]]:
    import torch

    from moe_prism import load, operating_point

    torch.set_num_threads(1)
    model, tokenizer = load(folder)
    text = Path(argparse.__file__).read_text()
    rows = []
    for batch in batches:
        pieces = [tokenizer(text[2000 * i : 2000 * i + 400])["input_ids"][:32] for i in range(batch)]
        ids = torch.tensor(pieces)

        def run(budget: float, ids: torch.Tensor = ids) -> float:
            begin = time.thread_time()
            with torch.no_grad(), operating_point(model, budget=budget):
                model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            return time.thread_time() - begin

        rows += ratios(run, [1.0, *budgets], rounds, {"batch": batch})
    return rows


def ratios(run: Any, budgets: list[float], rounds: int, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the budgets in turns; the first is what the others are compared with."""
    for budget in budgets:
        run(budget)
    found = [[run(budget) for budget in budgets] for _ in range(rounds)]
    return [
        {
            **head,
            "budget": budget,
            "seconds": statistics.median(times[i] for times in found),
            "to_full": statistics.median(times[i] / times[0] for times in found),
        }
        for i, budget in enumerate(budgets)
    ]


def work(folder: str) -> None:
    """What a process of `--beside` does: settle threads if asked to, then time a prompt and decoding on the wall for every line of stdin."""
    import torch

    from moe_prism import load, operating_point

    model, _ = load(folder)
    ids = torch.arange(1024)[None] % 300
    for _ in sys.stdin:
        out = []
        for budget in (1.0, 0.5):
            with torch.no_grad(), operating_point(model, budget=budget):
                begin = time.perf_counter()
                model(ids, use_cache=False)
                middle = time.perf_counter()
                model.generate(ids[:, :16], max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)
                out += [middle - begin, time.perf_counter() - middle]
        print(json.dumps(out), flush=True)


def beside(folder: str, rounds: int) -> list[dict[str, Any]]:
    """Rounds of alone and beside busy processes, for both ways of waiting."""
    from moe_prism.cores import SPINS, cores

    ways = {"OpenMP's own": {}, "as set": {"GOMP_SPINCOUNT": SPINS}}
    command = [sys.executable, __file__, folder, WORKER]
    workers = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **extra})
        for name, extra in ways.items()
    }

    def ask(worker: Any) -> list[float]:
        worker.stdin.write("\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())  # type: ignore[no-any-return]

    for worker in workers.values():
        ask(worker)
    times: dict[tuple[str, bool], list[list[float]]] = {}
    for _ in range(rounds):
        for busy in (False, True):
            others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(cores())] if busy else []
            for name, worker in workers.items():
                times.setdefault((name, busy), []).append(ask(worker))
            for other in others:
                other.kill()
                other.wait()
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    before = [statistics.median(column) for column in zip(*times["OpenMP's own", False], strict=True)]
    rows = []
    for name in ways:
        alone, busy = ([statistics.median(c) for c in zip(*times[name, b], strict=True)] for b in (False, True))
        for i, what in enumerate(("prompt full", "decode full", "prompt half", "decode half")):
            row = {"waiting": name, "what": what, "alone_ms": 1e3 * alone[i], "alone_to_before": alone[i] / before[i]}
            rows.append({**row, "beside_to_alone": busy[i] / alone[i]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--budgets", default=".75,.5,.25")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--isa", choices=tuple(SWITCHES))
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(WORKER, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    run_as(args.isa)
    if args.worker:
        work(args.folder)
        return
    if args.beside:
        rows = beside(args.folder, args.rounds)
    else:
        batches, budgets = [int(b) for b in args.batches.split(",")], [float(b) for b in args.budgets.split(",")]
        rows = generate_times(args.folder, batches, budgets, args.rounds, args.new)
    if args.json:
        print(json.dumps({"benchmark": "decode", "isa": args.isa, "rows": rows}))
    else:
        for row in rows:
            print(*(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
