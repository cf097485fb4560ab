"""bfloat16 experts read as they are stored, against a model that is float32 altogether: memory, time, and what differs.

    python benchmarks/stored_experts.py FOLDER [--batches 1,8,32] [--budgets 1,.5] [--prompt 512] [--rounds 7] [--isa avx2] [--json]

FOLDER: written by `moe-prism refactor` (or `wide_nano.py`) with bfloat16 weights. Both models decode the same held-out text from the same
caches, and read the same prompts, in turns in one process. A ratio is the median of the rounds' ratios: stored / float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from isa import SWITCHES, run_as
from printed import printed
from torch import Tensor

from moe_prism.artefact.load import load
from moe_prism.data import token_windows
from moe_prism.elastic import operating_point

PAST = 64  # tokens before a decode step


def megabytes(model: Any) -> float:
    """Of parameters, each counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def step_of(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """A decode step after ids [B, PAST], the same one at every call."""
    cache = model(ids[:, :PAST], use_cache=True).past_key_values

    def step() -> Tensor:
        out: Tensor = model(ids[:, PAST : PAST + 1], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return out

    return step


def prompt(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(ids).logits
    return out


def in_turns(first: Callable[[], Tensor], second: Callable[[], Tensor], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median ratio second / first."""
    times: list[tuple[float, float]] = []
    first(), second()
    for _ in range(rounds):
        begin = time.perf_counter()
        first()
        between = time.perf_counter()
        second()
        times.append((between - begin, time.perf_counter() - between))
    return *(statistics.median(t) for t in zip(*times, strict=True)), statistics.median(b / a for a, b in times)  # type: ignore[return-value]


@torch.no_grad()
def measured(models: tuple[Any, Any], ids: Tensor, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for what in [f"step {b}" for b in args.batches.split(",")] + [f"prompt {args.prompt}"]:
        kind, size = what.split()
        for budget in map(float, args.budgets.split(",")):
            with operating_point(models[0], budget=budget), operating_point(models[1], budget=budget):
                if kind == "step":
                    own = ids[: int(size)]
                    a, b = step_of(models[0], own), step_of(models[1], own)
                else:
                    own = ids.reshape(1, -1)[:, : int(size)]
                    a, b = (partial(prompt, model, own) for model in models)
                apart = float((a() - b()).norm() / a().norm())
                wide, stored, ratio = in_turns(a, b, args.rounds)
            yield {
                "what": what,
                "budget": budget,
                "wide_ms": wide * 1e3,
                "stored_ms": stored * 1e3,
                "ratio": ratio,
                "apart": apart,
            }


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['what']:>12}  budget {row['budget']:<4}  float32 {row['wide_ms']:8.2f} ms  stored {row['stored_ms']:8.2f} ms  "
        f"ratio {row['ratio']:.2f}  logits differ by {row['apart']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--budgets", default="1,.5")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", choices=tuple(SWITCHES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    run_as(args.isa)
    wide, tokenizer = load(args.folder, wide=True)
    stored, _ = load(args.folder)
    ids = token_windows(tokenizer, "stdlib", "evaluation", length=PAST + 1, tokens=(PAST + 1) * 64).ids
    if not args.json:
        print(f"weights: float32 {megabytes(wide):.0f} MB, experts as stored {megabytes(stored):.0f} MB", flush=True)
    rows = printed(measured((wide, stored), ids, args), show, quiet=args.json)
    if args.json:
        print(json.dumps({"wide_mb": megabytes(wide), "stored_mb": megabytes(stored), "rows": rows}))


if __name__ == "__main__":
    main()
