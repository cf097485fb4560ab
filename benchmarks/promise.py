"""Whether a budget holds: bytes that every request reads against those it asked for, and what holding costs in quality.

    python benchmarks/promise.py ELASTIC [--text stdlib --text topics ...] [--budgets .75,.5,.25] [--tokens 16384] [--length 256] [--json]

ELASTIC is a folder written by `moe-prism refactor`; every --text is a domain. Its requests are windows of the evaluation side, --length
tokens each, run one beside the other from their first token. Printed per domain and budget, for a budget that is held (`mean`), one that
caps every token (`strict`), and one that is held for nobody (`none`):

- bytes: the mean over all requests, over those asked for, and the share of requests whose own mean is within 3 % of that after 64 tokens,
  after 128, at the end, and at every token from the 64th on;
- KL: over that of the rule that is held for nobody, at equal bytes: those of each request (what holding costs a request), and those of
  the domain (which also counts what is lost because a hard request gets no more than an easy one). Brackets: 95 % intervals, by a
  bootstrap over requests.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_prism.artefact.load import load
from moe_prism.checkpoint import read_manifest
from moe_prism.data import token_windows
from moe_prism.elastic import Elastic
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.dial import spending
from moe_prism.elastic.rules import rules
from moe_prism.frontier.cost import measured_cost
from moe_prism.point import FULL, OperatingPoint

Rows = NDArray[np.float64]
CURVE = (0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.36, 0.42, 0.48, 0.54, 0.6, 0.66, 0.72, 0.78, 0.84, 0.9, 0.95)
"""Shares of the slots at which the rule is measured that is held for nobody."""
FROM, WITHIN, DRAWS = 64, 0.03, 2000
BATCH = 8


@dataclass(frozen=True)
class Run:
    """read [R, T]: bytes of every token of every request, as a share of all; kl [R]: mean of a request's tokens, in nats."""

    read: Rows
    kl: Rows


@contextmanager
def watched(elastic: Elastic) -> Iterator[list[Tensor]]:
    """The share of its slots that each token keeps, layer after layer."""
    kept: list[Tensor] = []
    executors = [layer.executor for layer in elastic.layers]
    for executor in executors:
        own = executor.settle

        def settle(candidates: Any, own: Any = own) -> Any:
            settled = own(candidates)
            kept.append(settled.keep.flatten(1).double().mean(1))
            return settled

        executor.settle = settle  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        for executor in executors:
            del executor.settle


@torch.no_grad()
def run(model: Any, ids: Tensor, points: Sequence[OperatingPoint]) -> list[Run]:
    """Every point over requests ids [R, T], against the full model."""
    elastic: Elastic = model._moe_prism
    steps = [Step(bind(elastic, [point])) for point in points]
    found: list[tuple[list[Rows], list[Rows]]] = [([], []) for _ in points]
    prices = [spending(layer, points[0].slots, rules.get("threshold"), elastic) for layer in elastic.layers]
    full = sum(price.full for price in prices)
    for start in range(0, len(ids), BATCH):
        rows = ids[start : start + BATCH]
        with elastic.at(elastic.full_step, counting=False):
            source = logits(model, rows)
        for step, (reads, kls) in zip(steps, found, strict=True):
            with elastic.at(step), elastic.count(), watched(elastic) as kept:
                here = logits(model, rows)
                counted = measured_cost(elastic, step).active_expert_bytes / (
                    full * elastic.layers[0].counter.chosen / rows.numel()
                )
            shares = [(price.fixed + price.slots * own.numpy()) / full for price, own in zip(prices, kept, strict=True)]
            read = np.sum(shares, 0).reshape(rows.shape)
            assert abs(read.mean() / counted - 1) < 1e-6, "the counter says something else"
            reads.append(read)
            kls.append((source.exp() * (source - here)).sum(-1).mean(1).double().numpy())
    return [Run(np.concatenate(reads), np.concatenate(kls)) for reads, kls in found]


def logits(model: Any, rows: Tensor) -> Tensor:
    """Log-probabilities [R, T - 1, V] of what follows."""
    return model(input_ids=rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)  # type: ignore[no-any-return]


def at_bytes(curve: Sequence[Run], wanted: Rows) -> Rows:
    """[R]: KL of every request, held for nobody, at the bytes [R] wanted of it; the logarithm is interpolated."""
    read, kl = (np.stack([getattr(one, name) for one in curve]) for name in ("read", "kl"))
    read, log = read.mean(2), np.log(np.maximum(kl, 1e-12))
    return np.array([np.exp(np.interp(w, read[:, r], log[:, r])) for r, w in enumerate(wanted)])


def at_mean_bytes(curve: Sequence[Run], rows: NDArray[np.int64], wanted: float) -> float:
    """KL of some requests together, held for nobody, at mean bytes."""
    read = [float(one.read[rows].mean()) for one in curve]
    return float(np.exp(np.interp(wanted, read, [np.log(one.kl[rows].mean()) for one in curve])))


def judged(budget: float, held: Run, curve: Sequence[Run]) -> dict[str, Any]:
    """What is printed of one domain, budget and control."""
    means = held.read.cumsum(1) / np.arange(1, held.read.shape[1] + 1) / budget
    near = np.abs(means - 1) <= WITHIN
    own = at_bytes(curve, held.read.mean(1))
    draws = np.random.default_rng(0).integers(0, len(own), (DRAWS, len(own)))
    everyone = np.arange(len(own))

    def each(rows: NDArray[np.int64]) -> float:
        return float(held.kl[rows].sum() / own[rows].sum())

    def together(rows: NDArray[np.int64]) -> float:
        return float(held.kl[rows].mean() / at_mean_bytes(curve, rows, float(held.read[rows].mean())))

    return {
        "bytes": float(held.read.mean() / budget),
        "largest token": float(held.read.max() / budget),
        "within": [float(near[:, at].mean()) for at in (FROM - 1, min(127, near.shape[1] - 1), -1)],
        "always": float(near[:, FROM - 1 :].all(1).mean()),
        "kl": float(held.kl.mean()),
        "each": [each(everyone), *np.percentile([each(rows) for rows in draws], [2.5, 97.5]).tolist()],
        "together": [together(everyone), *np.percentile([together(rows) for rows in draws[:500]], [2.5, 97.5]).tolist()],
    }


def nobody(budget: float, curve: Sequence[Run]) -> dict[str, Any]:
    """The same of a budget of slots that nobody holds, as it was before: between the shares that were measured."""
    read = np.stack([one.read.mean(1) for one in curve])
    means = np.array([np.interp(budget, CURVE, own) for own in read.T]) / budget
    return {"bytes": float(means.mean()), "within": float((np.abs(means - 1) <= WITHIN).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("elastic")
    parser.add_argument("--text", action="append")
    parser.add_argument("--budgets", default=".75,.5,.25")
    parser.add_argument("--tokens", type=int, default=16384, help="of each domain")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--side", default="evaluation", choices=("evaluation", "calibration"))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    model, tokenizer = load(asked.elastic)
    known = () if asked.side == "calibration" else read_manifest(asked.elastic)["calibration"]["documents"]
    budgets = [float(b) for b in asked.budgets.split(",")]
    controls = [(budget, control) for budget in budgets for control in ("mean", "strict")]
    points = [FULL.with_slots(s) for s in CURVE] + [FULL.with_budget(b, control=c) for b, c in controls]
    for text in asked.text or ["stdlib", "topics"]:
        windows = token_windows(tokenizer, text, asked.side, length=asked.length, tokens=asked.tokens, exclude=known)
        found = run(model, windows.ids, points)
        curve = found[: len(CURVE)]
        for (budget, control), held in zip(controls, found[len(CURVE) :], strict=True):
            row = {"text": text, "requests": len(windows.ids), "budget": budget, "control": control} | judged(budget, held, curve)
            row["nobody"] = nobody(budget, curve)
            print(json.dumps(row) if asked.json else told(row), flush=True)


def told(row: dict[str, Any]) -> str:
    def ratio(name: str) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*row[name])

    return (
        f"{row['text'][-24:]:24s} {row['requests']:4d} requests  {row['budget']:.2f} {row['control']:6s} bytes {row['bytes']:.3f} of asked "
        f"(none: {row['nobody']['bytes']:.3f}), largest token {row['largest token']:.2f}; within 3 % after 64/128/all: "
        f"{'/'.join(f'{w:.2f}' for w in row['within'])} (none: {row['nobody']['within']:.2f}), always {row['always']:.2f}; "
        f"KL {row['kl']:.4f}, to none at each request's bytes {ratio('each')}, at the domain's {ratio('together')}"
    )


if __name__ == "__main__":
    main()
