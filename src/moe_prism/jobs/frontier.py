"""Measure the quality/cost frontier of a model: any methods, on one chart with equal axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artefact.open import Opened, open_model
from ..checkpoint import versions
from ..data import Windows, token_windows
from ..elastic import Elastic
from ..elastic.runtime import slots_per_token
from ..errors import UsageError
from ..frontier import Frontier, MeasuredPoint, pareto
from ..frontier.cost import Cost, resident_bytes
from ..frontier.measure import Quality, measure
from ..methods.base import Candidate, Method, Subject, method
from ..methods.skip.base import plan_candidates
from ..methods.slots.rules import rule_setting
from ..progress import Report, peak_rss_bytes, silent
from ..routing import SkipPlan


@dataclass(frozen=True)
class FrontierOptions:
    """text: `stdlib`, `topics`, a file or a folder (its evaluation side is used); tokens and window length.

    rules: selection rules beside plain top-k; methods: more of them, or other methods by name (`methods.method`). Without either, and
    without plans: `product`. plans: skip plans (files) to measure, one point each. points: how many for methods with a continuous dial,
    for rules evenly spaced in relative cost; None: where the other rules are. calibration_tokens: what methods fit on, of the calibration
    side of `text`.
    """

    text: str = "stdlib"
    tokens: int = 16_384
    length: int = 512
    rules: tuple[str, ...] = ()
    points: int | None = None
    methods: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    calibration_tokens: int = 8_192

    def chosen(self) -> list[Method]:
        """What is measured, each once. Raises UsageError for an unknown name."""
        names = dict.fromkeys((*self.rules, *self.methods))
        return [method(name) for name in names or ([] if self.plans else ["product"])]

    def check(self) -> None:
        self.chosen()
        if self.points is not None and self.points < 2:
            raise UsageError(f"--points {self.points} is no curve", "give 2 or more, or leave it out")
        for name in ("tokens", "calibration_tokens"):
            if getattr(self, name) < self.length or self.length < 8:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} with --length {self.length} is too small",
                    "give at least one window of 8 tokens",
                )


def measure_frontier(folder: str | Path, options: FrontierOptions | None = None, *, report: Report = silent) -> Frontier:
    """Perplexity, KL to the source, top-1 agreement and cost of every operating point, and of plain top-k' for every k' < k.

    folder: written by `refactor`, or a plain checkpoint for methods that need no sub-experts. The source is the same model at full budget
    (equal to the original checkpoint to rounding). Text used in calibration is excluded.
    """
    options = options or FrontierOptions()
    options.check()
    named = [(Path(path).stem, SkipPlan.load(path)) for path in options.plans]
    opened = open_model(folder)
    windows = evaluation_windows(opened, options)
    subject = subject_of(opened, options, report)
    tagged = [(m.name, candidate) for m in options.chosen() for candidate in _candidates(m, subject)]
    tagged += [("plan file", candidate) for candidate in plan_candidates(named, subject)]
    if not any(_is_whole(candidate) for _, candidate in tagged):
        tagged.append((tagged[0][0], Candidate("full")))  # every curve ends at the model itself
    _check_names([candidate.name for _, candidate in tagged])
    split = len(tagged)
    tagged += [("topk", candidate) for candidate in _plain(subject)]
    rows = _measured(opened, windows.ids, tagged, report)
    flags = pareto([r["active_expert_bytes"] for r in rows], [r["kl"] for r in rows])
    points = tuple(MeasuredPoint(**row, pareto=flag) for row, flag in zip(rows, flags, strict=True))
    return Frontier(
        opened.name,
        opened.manifest["source"]["name"] if opened.manifest else opened.name,
        opened.n_sub,
        points[:split],
        points[split:],
        _provenance(opened, options, windows),
    )


def subject_of(opened: Opened, options: FrontierOptions, report: Report = silent) -> Subject:
    """What methods get to see of an opened model."""
    slots = slots_per_token(opened.elastic)

    def calibration() -> Tensor:
        wanted = options.calibration_tokens
        return token_windows(opened.tokenizer, options.text, "calibration", length=options.length, tokens=wanted).ids

    n_sub = opened.n_sub
    return Subject(opened.model, opened.tokenizer, opened.elastic, n_sub, slots // n_sub, calibration, options.points, report)


def evaluation_windows(opened: Opened, options: FrontierOptions) -> Windows:
    """Held-out text: the evaluation side, without what the model was calibrated on when it was refactored."""
    known = opened.manifest["calibration"]["documents"] if opened.manifest else ()
    return token_windows(
        opened.tokenizer, options.text, "evaluation", length=options.length, tokens=options.tokens, exclude=known
    )


def _candidates(chosen: Method, subject: Subject) -> Sequence[Candidate]:
    if chosen.needs_sub_experts and subject.n_sub == 1:
        raise UsageError(
            f"method '{chosen.name}' needs sub-experts, and this model has none",
            "give a folder written by `moe-prism refactor`, or other methods",
        )
    return chosen.candidates(subject)


def _plain(subject: Subject) -> list[Candidate]:
    """Plain top-k' for every k' < k."""
    return [
        Candidate(f"top-{n}", replace(rule_setting("linear", subject.n_sub * n, subject.slots), compensate=False))
        for n in range(1, subject.k)
    ]


def _is_whole(candidate: Candidate) -> bool:
    setting = candidate.setting
    untouched = setting.layers is None and setting.routing is None and candidate.resident_share == 1
    return untouched and not isinstance(setting.budget, Tensor) and setting.budget >= 1


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two points are called '{twice[0]}'", "name a method or a plan once")


def _measured(opened: Opened, ids: Tensor, tagged: Sequence[tuple[str, Candidate]], report: Report) -> list[dict[str, Any]]:
    """One row per candidate: the fields of `MeasuredPoint` but for `pareto`."""
    elastic, slots = opened.elastic, slots_per_token(opened.elastic)
    with report("frontier") as update:
        measured = measure(
            opened.model,
            elastic,
            ids,
            [candidate.setting for _, candidate in tagged],
            progress=update,
            installs=[candidate.install for _, candidate in tagged],
        )
    rows = zip(tagged, measured, strict=True)
    return [_row(elastic, label, candidate, *result, slots) for (label, candidate), result in rows]


def _row(elastic: Elastic, label: str, candidate: Candidate, quality: Quality, cost: Cost, slots: int) -> dict[str, Any]:
    setting = candidate.setting
    dial = setting.routing is None and setting.layers is None
    budget = setting.budget if dial else min(cost.k_slots / slots, 1.0)
    return {
        "name": candidate.name,
        "rule": label,
        "budget": min(budget, candidate.resident_share),
        "k_slots": cost.k_slots,
        "ppl": quality.ppl,
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
        "active_expert_params": cost.active_expert_params,
        "active_expert_bytes": cost.active_expert_bytes,
        "flops_per_token": cost.flops_per_token,
        "resident_expert_bytes": resident_bytes(elastic, setting, candidate.resident_share),
    }


def _provenance(opened: Opened, options: FrontierOptions, windows: Windows) -> dict[str, Any]:
    manifest: Mapping[str, Any] = opened.manifest or {"calibration": {}}
    return {
        # a plan is known by its name: where it lies on this machine is nobody's business
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()}
        | {"plans": [Path(p).name for p in options.plans]},
        "evaluation": {"text": windows.source, "tokens": windows.tokens, "documents": len(windows.documents)},
        "calibration": {k: v for k, v in manifest["calibration"].items() if k != "documents"},
        "recovery": [{k: v for k, v in step.items() if k != "inputs"} for step in manifest.get("recovery", [])],
        "versions": versions(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
