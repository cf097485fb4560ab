"""Threshold against plain top-k, int8 and int4 at equal actual bytes, on the four shipped domains, with 95 % intervals.

    python benchmarks/domains.py [--models nano,nano-mix] [--domains python,prose,headers,web] [--text domains] [--folder FOLDER]
                                 [--against top-3,top-2,top-1,int8,int4] [--tokens 8192] [--baselines] [--json]

Text to choose on and text to report are apart: cutoffs, predictors and compensation are fitted on the calibration side of `--text`,
defaults were chosen on the evaluation sides of `stdlib` and `topics`, and this benchmark measures on the evaluation side of `domains`, by
which nothing is chosen.

Plain top-k keeps 3, 2 and 1 of 4 experts as num_experts_per_tok does, and reads 75, 50 and 25 % of the bytes exactly. int8 and int4 keep
all experts of the checkpoint as it is, rounded to nearest; `--baselines` measures the baselines alone, without refactoring anything.
`threshold` does not read exactly what it is asked for. So it runs at two budgets, the second set by what the first one read, and its KL is
read off the line between them, log KL over bytes, at the bytes of what it is compared with. Bytes count everything a token reads of the
routed experts: kept slots, predictor, gate neurons and compensation. Beside it stands what the budget as asked read and lost.

Windows are the unit of the bootstrap: 2,000 samples of windows with replacement, the same for both rules.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from printed import domain_arguments, printed

from moe_prism.artefact.open import Opened, open_model
from moe_prism.data import token_windows
from moe_prism.data.bundled import DOMAINS
from moe_prism.elastic.bind import Step, bind
from moe_prism.frontier.cost import measured_cost
from moe_prism.jobs.frontier import subject_of
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.methods.quantize.uniform_bits import standing_rows
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import OperatingPoint, SlotRule
from moe_prism.routing.patterns import uniform

MODELS = ["nano", "nano-mix"]
AGAINST = ["top-3", "top-2", "top-1", "int8", "int4"]
RESAMPLES = 2000
LEAST = 0.02  # of the slots: the smallest budget that is tried


class Run(NamedTuple):
    """One point on one text. kl [n]: of each window, in nats per token; share: the bytes that it read, of all bytes."""

    kl: NDArray[np.float64]
    share: float


@torch.no_grad()
def run_points(model: Any, ids: torch.Tensor, points: Sequence[OperatingPoint]) -> list[Run]:
    """Every point over every window [n, length] alone; a change of weights is entered once for all of them."""
    elastic = model._moe_prism

    def run(step: Step, judge: Callable[[int, torch.Tensor], None]) -> float:
        with elastic.at(step), elastic.count():
            for number in range(len(ids)):
                judge(number, model(input_ids=ids[number : number + 1], use_cache=False).logits[0, :-1].float().log_softmax(-1))
        return measured_cost(elastic, step).active_expert_bytes

    sources: list[torch.Tensor] = []
    full = run(elastic.full_step, lambda _, found: sources.append(found))
    runs = []
    for point in points:
        kl = np.zeros(len(ids))

        def compare_with_source(number: int, found: torch.Tensor, kl: NDArray[np.float64] = kl) -> None:
            source = sources[number]
            kl[number] = float((source.exp() * (source - found)).sum(-1).mean())

        runs.append(Run(kl, run(Step(bind(elastic, [point])), compare_with_source) / full))
    return runs


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


def standards(opened: Opened) -> dict[str, OperatingPoint]:
    """Plain top-k' for every k' below k, int8 and int4, by name."""
    subject = subject_of(opened, FrontierOptions())
    plain = {f"top-{n}": OperatingPoint(routing=(uniform(subject.layers, subject.k, n),)) for n in range(subject.k - 1, 0, -1)}
    return plain | {row.name: row.point for row in standing_rows(subject)}


def alone(other: Run, windows: NDArray[np.int64]) -> dict[str, Any]:
    """What is said of a baseline by itself. windows [r, n]: resampled."""
    return {
        "share": other.share,
        "other_kl": float(other.kl.mean()),
        "other_interval": interval(other.kl[windows].mean(axis=1)),
    }


def resampled(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def compare(model: Any, ids: torch.Tensor, others: Sequence[Run], seed: int) -> Iterator[dict[str, Any]]:
    """A row for each of the others on one text: its KL, and that of `threshold` at its bytes."""
    firsts = run_points(model, ids, [threshold(other.share) for other in others])
    again = [threshold(other.share**2 / run.share) for other, run in zip(others, firsts, strict=True)]
    seconds = run_points(model, ids, again)
    whole, samples = np.arange(len(ids))[None], resampled(len(ids), seed)
    for other, first, second in zip(others, firsts, seconds, strict=True):
        ratio = kl_at(other.share, first, second, samples) / other.kl[samples].mean(axis=1)
        ours = kl_at(other.share, first, second, whole)[0]
        yield {
            **alone(other, samples),
            "kl": float(ours),
            "interval": interval(kl_at(other.share, first, second, samples)),
            "ratio": float(ours / other.kl.mean()),
            "ratio_interval": interval(ratio),
            "asked_share": first.share,
            "asked_kl": float(first.kl.mean()),
            "second_share": second.share,
        }


def windows_of(opened: Opened, domain: str, args: argparse.Namespace) -> torch.Tensor:
    return token_windows(opened.tokenizer, f"domains/{domain}", "evaluation", length=args.length, tokens=args.tokens).ids


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.models:
        source = open_model(name)
        known = standards(source)
        points = [known[each] for each in args.against]
        head = {"model": name, "windows": args.tokens // args.length}
        others: dict[str, list[Run]] = {}
        for domain in args.domains:
            others[domain] = run_points(source.model, windows_of(source, domain, args), points)
            samples = resampled(len(others[domain][0].kl), args.seed)
            for each, run in zip(args.against, others[domain], strict=True) if args.baselines else ():
                yield {**head, "domain": domain, "against": each, **alone(run, samples)}
        if args.baselines:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.folder / name if args.folder else Path(scratch) / "elastic"
            if not args.folder:
                refactor(name, folder, RefactorOptions(calibration=CalibrateOptions(text=args.text)))
            opened = open_model(folder)
            for domain, runs in others.items():
                found = compare(opened.model, windows_of(opened, domain, args), runs, args.seed)
                for each, row in zip(args.against, found, strict=True):
                    yield {**head, "domain": domain, "against": each, **row}


def show(row: dict[str, Any]) -> str:
    def span(value: float, ends: Sequence[float], digits: int) -> str:
        return f"{value:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"

    said = (
        f"{row['model']:9} {row['domain']:8} {row['share']:5.1%}: "
        f"{row['against']} {span(row['other_kl'], row['other_interval'], 4)}"
    )
    if "kl" not in row:
        return said
    return (
        f"{said}  threshold {span(row['kl'], row['interval'], 4)}  ratio {span(row['ratio'], row['ratio_interval'], 3)}  "
        f"(as asked: read {row['asked_share']:.1%}, KL {row['asked_kl']:.4f})"
    )


def main() -> None:
    parser = domain_arguments(__doc__, MODELS, DOMAINS, 8192)
    parser.add_argument("--against", default=AGAINST, type=lambda text: text.split(","), help="comma-separated")
    parser.add_argument("--baselines", action="store_true", help="only what `threshold` is compared with")
    parser.add_argument("--folder", type=Path, help="with refactored models by name, instead of refactoring them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = printed(rows(args), show, args.json)
    if args.json:
        print(json.dumps({"benchmark": "domains", "rows": found}))


if __name__ == "__main__":
    main()
