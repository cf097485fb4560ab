"""What expert skipping costs in quality: every method against uniform counts at the same mean, and sub-experts at no more bytes.

    python benchmarks/skipping.py [--model nano] [--text stdlib] [--means 3,2,1] [--seeds 3] [--tokens 12288] [--calibration-tokens 24576]
                                  [--folder ELASTIC] [--json]

Each seed is a part of the calibration windows (to fit on) and a part of the evaluation windows (to measure on), disjoint from the other
seeds' parts; calibration and evaluation text are the two sides of --text, disjoint by file. Baseline, measured in the same run on the
same windows: `uniform`. Ratios are of the mean KL over all seeds, with the smallest and largest ratio of one seed behind it. `product`
and `threshold` are asked for the expert bytes of uniform at that mean, their predictor included. Without --folder the model is
refactored first, on that text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_prism.artefact.open import Opened, open_model
from moe_prism.data import token_windows
from moe_prism.frontier.measure import measure
from moe_prism.jobs.frontier import evaluation_windows, subject_of
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.methods.base import Subject
from moe_prism.methods.skip.base import skip_method
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import FULL, OperatingPoint, SlotRule

METHODS = (
    "uniform",
    "pattern-skip:descending",
    "pattern-skip:ascending",
    "pattern-skip:peak",
    "pattern-skip:valley",
    "sensitivity:alone",
    "sensitivity:isolated",
    "sensitivity",
    "ser",
    "naee",
    "score-mass",
    "weight-cutoff:uniform",
    "weight-cutoff:sensitivity:alone",
    "weight-cutoff",
    "batch-redistribution:uniform",
    "batch-redistribution:sensitivity:alone",
    "batch-redistribution",
)
SCALED = ("uniform", "sensitivity", "score-mass", "weight-cutoff")
"""Measured with keep_mass the other way round too."""


def points_at(subject: Subject, mean: float) -> dict[str, tuple[OperatingPoint, Any]]:
    """name -> (point, counts per layer of its stage)."""
    found: dict[str, tuple[OperatingPoint, Any]] = {}
    for name in METHODS if mean > 1 else METHODS[:1]:  # a token keeps its first expert: at a mean of 1 all are one
        point = skip_method(name).point(subject, mean).point
        (stage,) = point.routing
        found[name] = point, stage.layers
        if name in SCALED and mean > 1:
            other = replace(stage, keep_mass=not stage.keep_mass)
            found[f"{name}, keep_mass {other.keep_mass}"] = OperatingPoint(routing=(other,)), stage.layers
    found["product"] = OperatingPoint(slots=SlotRule(budget=mean / subject.k, rule="product", of="bytes")), None
    found["threshold"] = FULL.with_budget(mean / subject.k, "threshold"), None
    if mean == 1:
        return found
    half = mean + (subject.k - mean) / 2  # half of the cut by skipping, the rest by sub-experts of what is left
    point = skip_method("sensitivity:alone").point(subject, half).point
    found["sensitivity:alone and threshold"] = point.with_budget(mean / half, "threshold"), point.routing[0].layers
    return found


def rows(opened: Opened, args: argparse.Namespace) -> list[dict[str, Any]]:
    options = FrontierOptions(text=args.text, tokens=args.tokens, length=args.length)
    evaluation = evaluation_windows(opened.tokenizer, opened.documents, options).ids
    wanted = args.calibration_tokens
    calibration = token_windows(opened.tokenizer, args.text, "calibration", length=args.length, tokens=wanted).ids
    found = []
    for seed in range(args.seeds):
        found += one_seed(opened, options, calibration[seed :: args.seeds], evaluation[seed :: args.seeds], args.means, seed)
    return found


def one_seed(
    opened: Opened, options: FrontierOptions, calibration: Tensor, evaluation: Tensor, means: list[float], seed: int
) -> list[dict[str, Any]]:
    subject = subject_of(opened, options)
    subject.__dict__["calibration"] = calibration  # this seed's part
    plans = [(mean, name, *made) for mean in means for name, made in points_at(subject, mean).items()]
    measured = measure(opened.model, evaluation, [point for _, _, point, _ in plans], batch=2)
    return [
        {
            "seed": seed,
            "mean": mean,
            "method": name,
            "counts": counts,
            "kl": one.quality.kl,
            "ppl": one.quality.ppl,
            "experts": one.cost.k_slots / opened.n_sub,
            "bytes": one.cost.active_expert_bytes,
        }
        for (mean, name, _, counts), one in zip(plans, measured, strict=True)
    ]


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per mean and method: means over the seeds, ratio to uniform and its range."""
    lines = []
    for mean, name in dict.fromkeys((row["mean"], row["method"]) for row in found):
        mine = [row for row in found if (row["mean"], row["method"]) == (mean, name)]
        base = [row for row in found if (row["mean"], row["method"]) == (mean, "uniform")]
        ratios = [m["kl"] / b["kl"] for m, b in zip(mine, base, strict=True)]
        average = {key: sum(row[key] for row in mine) / len(mine) for key in ("kl", "ppl", "experts", "bytes")}
        ratio = average["kl"] / (sum(row["kl"] for row in base) / len(base))
        bytes_ratio = average["bytes"] / (sum(row["bytes"] for row in base) / len(base))
        lines.append(
            {
                "mean": mean,
                "method": name,
                **average,
                "ratio": ratio,
                "low": min(ratios),
                "high": max(ratios),
                "bytes_ratio": bytes_ratio,
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--folder", help="an elastic model, instead of refactoring --model")
    parser.add_argument("--means", default="3,2,1", type=lambda text: [float(part) for part in text.split(",")])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--calibration-tokens", type=int, default=24_576)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary) / ("" if args.folder else "elastic")
        if not args.folder:
            refactor(args.model, folder, RefactorOptions(calibration=CalibrateOptions(text=args.text)))
        found = rows(open_model(folder), args)
    lines = summary(found)
    if args.json:
        print(json.dumps({"benchmark": "skipping", "rows": lines, "seeds": found}))
        return
    for line in lines:
        print(
            f"mean {line['mean']:g} {line['method']:36} KL {line['kl']:.4f}  {line['ratio']:.2f}x uniform ({line['low']:.2f} to "
            f"{line['high']:.2f}), bytes {line['bytes_ratio']:.3f}x, {line['experts']:.3f} experts, perplexity {line['ppl']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
