"""A layer's step from the store by compiled calls against the same by its parts, and against the model in memory.

    python benchmarks/store_call.py [--folder ELASTIC] [--shares .25 1] [--budgets 1 .75] [--tokens 100] [--rounds 4] [--json]

One model decodes one held-out text, A B A B, with `store.compiled` on and off: the same cache, the same file, the same bits. Milliseconds
per token are of processor time of this process, and of the clock. One thread computes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from offload import PROMPT, elastic, expert_bytes, held_out, pack_for

from moe_prism.artefact.load import load
from moe_prism.elastic import operating_point
from moe_prism.point import FULL, OperatingPoint
from moe_prism.store import StoreOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="an elastic model, instead of refactoring prism-nano")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 1.2], help="of the expert weights; beyond 1 all fit")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.75])
    parser.add_argument("--policy", default="lfu")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.large = False
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        rows = measured(args, Path(temporary))
    if args.json:
        json.dump({"benchmark": "store_call", "arguments": vars(args), "rows": rows}, sys.stdout)
    for row in () if args.json else rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


@torch.no_grad()
def timed(model: Any, ids: torch.Tensor, point: OperatingPoint, count: int) -> tuple[float, float]:
    """Seconds of processor time and of the clock of a decode step, after a prompt that is not counted."""
    with operating_point(model, point=point):
        past = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
        began = time.process_time(), time.perf_counter()
        for i in range(PROMPT, PROMPT + count):
            past = model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True).past_key_values
        return (time.process_time() - began[0]) / count, (time.perf_counter() - began[1]) / count


def measured(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    folder = elastic(args, work)
    whole, tokenizer = load(folder)
    every, experts = args.rounds, expert_bytes(folder, whole)
    args.rounds = 1
    ids = held_out(folder, tokenizer, args)
    pack_for(folder, work / "parts")
    rows = []
    for share in args.shares:
        model, _ = load(folder, store=StoreOptions(int(share * experts), work / "parts", policy=args.policy))
        store = model._moe_prism.store
        for budget in args.budgets:
            point, cpu, wall = FULL.with_budget(budget), {}, {}
            for number in range(every + 1):
                for name in ("compiled", "parts", "memory"):
                    store.compiled = name == "compiled"
                    own, clock = timed(whole if name == "memory" else model, ids, point, args.tokens)
                    if number:  # the first round warms up
                        cpu.setdefault(name, []).append(own)
                        wall.setdefault(name, []).append(clock)
            ms = {name: 1e3 * statistics.median(found) for name, found in cpu.items()}
            clocks = {f"{name}_clock": 1e3 * statistics.median(found) for name, found in wall.items()}
            rows.append({"share": share, "budget": budget, **ms, "ratio": ms["compiled"] / ms["parts"], **clocks})
        store.close()
    return rows


if __name__ == "__main__":
    main()
