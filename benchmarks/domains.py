"""Threshold against plain top-k at equal actual bytes, on the four shipped domains, with 95 % intervals.

    python benchmarks/domains.py [--models nano,nano-mix] [--domains python,prose,headers,web] [--text domains] [--json]

Text to choose on and text to report are apart: cutoffs, predictors and compensation are fitted on the calibration side of `--text`,
defaults were chosen on the evaluation sides of `stdlib` and `topics`, and this benchmark measures on the evaluation side of `domains`, by
which nothing is chosen.

Plain top-k keeps 3, 2 and 1 of 4 experts as num_experts_per_tok does, and reads 75, 50 and 25 % of the bytes exactly. `threshold` does
not read what it is asked for on other text than it was fitted on. So it runs at two budgets, the second set by what the first one read,
and its KL is read off the line between them, log KL over bytes, at the bytes of plain. Bytes count everything a token reads of the
routed experts: kept slots, predictor, gate neurons and compensation. Beside it stands what the budget as asked read and lost.

Windows are the unit of the bootstrap: 2,000 samples of windows with replacement, the same for both rules.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from printed import domain_arguments, printed

from moe_prism.artefact.load import load
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.frontier.measure import measure
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.point import FULL, OperatingPoint, SlotRule
from moe_prism.routing.patterns import uniform

MODELS = ["nano", "nano-mix"]
KEPT = (3, 2, 1)
RESAMPLES = 2000
LEAST = 0.02  # of the slots: the smallest budget that is tried


class Run(NamedTuple):
    """One point on one text. kl [n]: of each window, in nats per token; share: the bytes that it read, of all bytes."""

    kl: NDArray[np.float64]
    share: float


def run_points(model: Any, ids: torch.Tensor, points: Sequence[OperatingPoint]) -> list[Run]:
    """Every point over every window [n, length] alone."""
    rows = [measure(model, ids[i : i + 1], [FULL, *points]) for i in range(len(ids))]
    full = sum(row[0].cost.active_expert_bytes for row in rows)
    return [
        Run(
            np.array([row[p].quality.kl for row in rows]),
            sum(row[p].cost.active_expert_bytes for row in rows) / full,
        )
        for p in range(1, len(points) + 1)
    ]


def threshold(budget: float) -> OperatingPoint:
    return OperatingPoint(slots=SlotRule(budget=min(1.0, max(LEAST, budget))))


def kl_at(share: float, first: Run, second: Run, windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean KL of each sample of windows [r, n] at a share of the bytes, on the line of log KL through two runs."""
    low, high = (np.log(run.kl[windows].mean(axis=1)) for run in (first, second))
    gap = second.share - first.share
    where = 1.0 if abs(gap) < 1e-4 else (share - first.share) / gap
    return np.exp(low + where * (high - low))


def interval(samples: NDArray[np.float64]) -> list[float]:
    return [float(x) for x in np.quantile(samples, (0.025, 0.975))]


def compare(model: Any, ids: torch.Tensor, k: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows for 3, 2 and 1 kept experts of 4 on one text."""
    layers = len(model._moe_prism.layers)
    asked = [kept / k for kept in KEPT]
    plain = [OperatingPoint(routing=(uniform(layers, k, kept),)) for kept in KEPT]
    found = run_points(model, ids, [*plain, *map(threshold, asked)])
    plains, firsts = found[: len(KEPT)], found[len(KEPT) :]
    again = [threshold(budget * p.share / run.share) for budget, p, run in zip(asked, plains, firsts, strict=True)]
    seconds = run_points(model, ids, again)
    whole = np.arange(len(ids))[None]
    samples = np.random.default_rng(seed).integers(0, len(ids), (RESAMPLES, len(ids)))
    for budget, p, first, second in zip(asked, plains, firsts, seconds, strict=True):
        ratio = kl_at(p.share, first, second, samples) / p.kl[samples].mean(axis=1)
        ours = kl_at(p.share, first, second, whole)[0]
        yield {
            "budget": budget,
            "plain_share": p.share,
            "plain_kl": float(p.kl.mean()),
            "plain_interval": interval(p.kl[samples].mean(axis=1)),
            "kl": float(ours),
            "interval": interval(kl_at(p.share, first, second, samples)),
            "ratio": float(ours / p.kl.mean()),
            "ratio_interval": interval(ratio),
            "asked_share": first.share,
            "asked_kl": float(first.kl.mean()),
            "second_share": second.share,
        }


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "elastic"
            refactor(name, out, RefactorOptions(calibration=CalibrateOptions(text=args.text)))
            model, tokenizer = load(out)
            for domain in args.domains:
                source = f"domains/{domain}"
                ids = token_windows(tokenizer, source, "evaluation", length=args.length, tokens=args.tokens).ids
                for row in compare(model, ids, model.config.num_experts_per_tok, args.seed):
                    yield {"model": name, "domain": domain, "windows": len(ids), **row}


def show(row: dict[str, Any]) -> str:
    def span(value: float, ends: Sequence[float], digits: int) -> str:
        return f"{value:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"

    return (
        f"{row['model']:9} {row['domain']:8} {row['plain_share']:5.1%}: plain {span(row['plain_kl'], row['plain_interval'], 4)}  "
        f"threshold {span(row['kl'], row['interval'], 4)}  ratio {span(row['ratio'], row['ratio_interval'], 3)}  "
        f"(asked {row['budget']:.0%}: read {row['asked_share']:.1%}, KL {row['asked_kl']:.4f})"
    )


def main() -> None:
    parser = domain_arguments(__doc__, MODELS, DOMAINS, 8192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "domains", "rows": found}))


if __name__ == "__main__":
    main()
