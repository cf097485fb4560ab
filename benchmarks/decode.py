"""Time of nano end to end at budgets, as a ratio to its full budget; and beside one busy process per core, as a ratio to alone.

    python benchmarks/decode.py FOLDER [--batches 1,8,32] [--budgets .75,.5,.25] [--rounds 5] [--new 24] [--isa avx2]
    python benchmarks/decode.py FOLDER --holding [--batches 1] [--budgets .5] [--rounds 15]
    python benchmarks/decode.py FOLDER --beside [--rounds 3]

FOLDER: of `moe-prism refactor nano`. Decode steps of `generate` and of the embedded engine, a batch at one budget that is held, as users
have it; `stock` is full budget by the model's own function. Budgets take turns, A B C D A B C D; a figure is the median over rounds of a
round's ratio, and a round's figure its median step. The clock is the processor time of the thread that makes the steps, which a busy
machine disturbs less than the clock on the wall.

`--holding` runs each budget of `generate` held for the request and held for nobody, in turns; `held_to_none` is the ratio of their steps,
and the brackets have the middle half of the rounds.

`--beside` times one forward of 512 tokens and 8 decoding steps in processes of their own, on the wall: alone and beside busy processes,
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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from end_to_end import PROMPT, engine, generated, texts
from isa import SWITCHES, run_as

WORKER = "--worker"
BUSY = "while True: pass"


def step_times(folder: str, batches: list[int], budgets: list[float], rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Of `generate` and of the embedded engine, decode steps by the processor time of the thread that makes them."""
    import torch

    from moe_prism import load, operating_point

    torch.set_num_threads(1)
    model, tokenizer = load(folder)
    rows_of = texts(tokenizer, PROMPT + steps + 2)
    serve = engine(model, rows_of, steps, sorted([*budgets, 1.0]), time.thread_time)

    def generate(batch: int, what: float, turn: int) -> float:
        with operating_point(model, budget=what):
            return generated(model, rows_of(batch, turn), steps, time.thread_time)

    def stock(batch: int, what: float, turn: int) -> float:
        """Full budget by the model's own function."""
        with own_function(model._moe_prism):
            return generate(batch, 1.0, turn)

    for batch in batches:
        for part, run in {"generate": generate, "serve": serve}.items():
            runs: list[tuple[Any, Any]] = [(run, budget) for budget in (1.0, *budgets)]
            names: list[Any] = [1.0, *budgets]
            if part == "generate":
                runs, names = [*runs, (stock, 1.0)], [*names, "stock"]
            yield from ratios(runs, names, rounds, {"part": part, "batch": batch})


def holding(folder: str, batches: list[int], budgets: list[float], rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Decode steps of `generate` at budgets that are held for the request, against the same held for nobody."""
    import torch

    from moe_prism import load, operating_point
    from moe_prism.point import FULL

    torch.set_num_threads(1)
    model, tokenizer = load(folder)
    rows_of = texts(tokenizer, PROMPT + steps + 2)

    def generate(batch: int, budget: float, control: str, turn: int) -> float:
        with operating_point(model, point=FULL.with_budget(budget, "threshold", control)):
            return generated(model, rows_of(batch, turn), steps, time.thread_time)

    for batch in batches:
        for budget in budgets:
            times = []
            for turn in range(rounds + 1):  # the first pays for what was never run before
                order = ("mean", "none") if turn % 2 else ("none", "mean")
                found = {control: generate(batch, budget, control, turn) for control in order}
                times.append((found["mean"], found["none"]))
            ratios = [held / free for held, free in times[1:]]
            low, middle, high = (round(q, 3) for q in statistics.quantiles(ratios, n=4))
            ms = 1e3 * statistics.median(held for held, _ in times[1:])
            yield {"part": "holding", "batch": batch, "budget": budget, "ms": ms, "held_to_none": middle, "half": (low, high)}


@contextmanager
def own_function(elastic: Any) -> Iterator[None]:
    """Have the model's own function compute whole experts."""
    for layer in elastic.layers:
        layer.executor.way = "grouped"
    yield
    for layer in elastic.layers:
        layer.executor.way = "auto"


def ratios(runs: list[tuple[Any, Any]], names: list[Any], rounds: int, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Run all in turns, on other text in every turn; the first is what the others are compared with."""
    batch = head["batch"]
    found = [[run(batch, what, turn) for run, what in runs] for turn in range(rounds + 1)][1:]
    return [
        {
            **head,
            "budget": name,
            "ms": 1e3 * statistics.median(times[i] for times in found),
            "to_full": statistics.median(times[i] / times[0] for times in found),
        }
        for i, name in enumerate(names)
    ]


def work(folder: str) -> None:
    """What a process of `--beside` does: time a prompt and decoding on the wall for every line of stdin."""
    import torch

    from moe_prism import load, operating_point

    model, _ = load(folder)
    ids = torch.arange(512)[None] % 300
    for _ in sys.stdin:
        out = []
        for budget in (1.0, 0.5):
            with torch.no_grad(), operating_point(model, budget=budget):
                begin = time.perf_counter()
                model(ids, use_cache=False)
                middle = time.perf_counter()
                model.generate(ids[:, :16], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
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
    parser.add_argument("--holding", action="store_true")
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(WORKER, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    run_as(args.isa)
    if args.worker:
        work(args.folder)
        return
    batches, budgets = [int(b) for b in args.batches.split(",")], [float(b) for b in args.budgets.split(",")]
    timed = holding if args.holding else step_times
    found = beside(args.folder, args.rounds) if args.beside else timed(args.folder, batches, budgets, args.rounds, args.new)
    rows = []
    for row in found:
        rows.append(row)
        if not args.json:
            print(
                *(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()),
                flush=True,
            )
    if args.json:
        print(json.dumps({"benchmark": "decode", "isa": args.isa, "rows": rows}), flush=True)
    os._exit(0)  # the engine's thread need not be waited for


if __name__ == "__main__":
    main()
