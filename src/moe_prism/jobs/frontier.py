"""Measure the quality/cost frontier of a model: any methods, on one chart with equal axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artefact.open import Opened, known_documents, open_model, sub_experts
from ..artefact.streamed import open_streamed
from ..catalogue import methods
from ..checkpoint import versions
from ..checkpoint.recipe import recipe_facts
from ..compress.changes import change_of
from ..data import Windows, token_windows
from ..elastic.bind import leaves_out_neurons
from ..elastic.runtime import slots_per_token
from ..errors import UsageError
from ..forecast.work_time import Seconds
from ..frontier import DomainQuality, Frontier, MeasuredPoint, pareto
from ..frontier.judge.base import ASKED
from ..frontier.judge.run import Judge, Judged
from ..frontier.measure import BATCH, Measurement, measure
from ..methods.base import Method, Subject
from ..methods.find import method
from ..methods.quantize.uniform_bits import standing_rows
from ..methods.skip.base import skip_method
from ..model import load_tokenizer, resolve
from ..model.place import recorded
from ..options.frontier import FrontierOptions
from ..point import FULL, NamedPoint, read_points
from ..point.base import OF_WIDTHS
from ..progress import Report, peak_rss_bytes, silent
from .rehearsal import begin
from .resources import model_tree, needed_by_frontier, needed_by_running
from .which_text import with_text

GIVEN = "given point"
ALL_PER_TOKEN = "all-per-token"  # noqa: S105 - no password


def expanded(name: str) -> list[str]:
    """The methods that a name stands for: `all-per-token` for all whose points can share a batch, else itself."""
    if name != ALL_PER_TOKEN:
        return [name]
    names = [*methods.names("slots"), *methods.names("routing")]
    return [each for each in names if not getattr(methods.get(each), "depends_on_batch", False)]


def chosen(options: FrontierOptions) -> list[Method]:
    """The methods that are measured, each once. Raises UsageError for an unknown name."""
    names = dict.fromkeys(name for given in (*options.rules, *options.methods) for name in expanded(given))
    return [method(name) for name in names or ([] if options.given else ["product"])]


def measure_frontier(folder: str | Path, options: FrontierOptions | None = None, *, report: Report = silent) -> Frontier:
    """Perplexity, KL to the source, top-1 agreement and cost of every operating point, of plain top-k' for every k' < k, of int8 and int4.

    folder: written by `refactor`, or a plain checkpoint for methods that need no sub-experts. The source is the same model at full budget
    (equal to the original checkpoint to rounding). Text used in calibration is excluded.

    >>> import moe_prism
    >>> asked = moe_prism.FrontierOptions(methods=("uniform",), tokens=256, length=128, calibration_tokens=256)
    >>> found = moe_prism.measure_frontier("nano", asked)
    >>> found.every[0].kl >= 0, found.to_records()[0]["rule"]
    (True, 'uniform')
    """
    options = options or FrontierOptions()
    options.check()
    options = with_text(options, folder)
    asked = chosen(options)
    named = [point for path in options.given for point in read_points(path)]
    if options.low_memory:
        _check_streamable(asked)
    where = resolve(folder)
    tree, cut, tokenizer = model_tree(where), sub_experts(where), load_tokenizer(where)
    windows = evaluation_windows(tokenizer, known_documents(where), options)
    for each in asked:
        _check_cut(each, cut)
    fits = any(each.needs for each in asked)
    if fits:
        calibration_ids(tokenizer, options)
    length, low_memory = windows.ids.shape[1], options.low_memory
    back = length if any("gradients" in getattr(each, "collectors", ()) for each in asked) else 0
    rows = max(BATCH * length, ASKED if options.judge else 0)
    running = needed_by_running(tree, rows=rows, cut=cut, fits=fits, back=back, low_memory=low_memory)
    needed = needed_by_frontier(tree, running, low_memory=low_memory, encodes=any(each.acts == "weights" for each in asked))
    begin(needed, lasts=partial(_lasts, where, asked, windows, options, cut))
    if options.low_memory:
        with open_streamed(folder) as opened:
            return _measure(opened, asked, named, windows, options, report)
    return _measure(open_model(folder), asked, named, windows, options, report)


def _lasts(where: Path, asked: Sequence[Method], windows: Windows, options: FrontierOptions, cut: int) -> Seconds | None:
    from .job_times import frontier_time  # a real run wants none of it

    return frontier_time(where, asked, windows, options, cut)


def _check_streamable(asked: Sequence[Method]) -> None:
    """UsageError for a method whose points no streamed model can run, before hours of work."""
    wrong = next((m for m in asked if m.acts == "weights" or m.name.partition(":")[0] in OF_WIDTHS), None)
    if wrong is not None:
        raise UsageError(f"method '{wrong.name}' works on all weights in memory", "leave it or --low-memory out")


def _measure(
    opened: Opened,
    asked: Sequence[Method],
    named: Sequence[NamedPoint],
    windows: Windows,
    options: FrontierOptions,
    report: Report,
) -> Frontier:
    experts = min(layer.parts.layer.num_experts for layer in opened.elastic.layers)
    if options.devices > experts:
        raise UsageError(f"--devices {options.devices}, and a layer has {experts} experts", "give at most as many")
    judge = Judge(opened.model, opened.tokenizer, windows.ids, options.judge) if options.judge else None
    subject = subject_of(opened, options, report)
    tagged = [(m.name, point) for m in asked for point in _points(m, subject)]
    made = {point.name: point.point for _, point in tagged}  # what a method makes again is measured once
    tagged += [(GIVEN, p) for p in named if not p.point.is_full and made.get(p.name) != p.point]
    if not any(point.point.is_full for _, point in tagged):
        tagged.append(
            (tagged[0][0] if tagged else GIVEN, NamedPoint(name="full", point=FULL))
        )  # every curve ends at the model itself
    _check_names([point.name for _, point in tagged])
    split = len(tagged)
    known = {point.name for _, point in tagged}
    tagged += [("topk", point) for point in _plain(subject) if point.name not in known]
    bits_from = len(tagged)
    rows = [] if options.low_memory else standing_rows(subject)
    tagged += [("bits-alone", point) for point in rows if point.name not in known]
    asked_points = [point.point for _, point in tagged]
    with report("frontier") as update:
        found = measure(opened.model, windows.ids, asked_points, progress=update, parts=windows.parts, devices=options.devices)
    judged = None
    if judge is not None:
        with report("judge") as update:
            judged = judge.ask(asked_points, update)
    flags = pareto([m.cost.active_expert_bytes for m in found], [m.quality.kl for m in found])
    every = zip(tagged, found, flags, strict=True)
    whole = subject.k * sum(layer.parts.layer.parameters_per_expert() for layer in subject.elastic.layers)
    points = tuple(_measured(label, point, one, subject.slots, whole, flag) for (label, point), one, flag in every)
    if judged is not None:
        points = tuple(replace(point, slices=scores) for point, scores in zip(points, judged.points, strict=True))
    return Frontier(
        opened.name,
        opened.manifest["source"]["name"] if opened.manifest else opened.name,
        opened.n_sub,
        points[:split],
        points[split:bits_from],
        _provenance(opened, options, windows, judged),
        points[bits_from:],
    )


def calibration_ids(tokenizer: Any, options: FrontierOptions) -> Tensor:
    """Token windows [n, length] that methods are fitted on."""
    wanted = options.calibration_tokens
    return token_windows(tokenizer, options.source, "calibration", length=options.length, tokens=wanted).ids


def subject_of(opened: Opened, options: FrontierOptions, report: Report = silent) -> Subject:
    """What methods get to see of an opened model."""
    slots = slots_per_token(opened.elastic)

    n_sub = opened.n_sub
    return Subject(
        model=opened.model,
        tokenizer=opened.tokenizer,
        elastic=opened.elastic,
        n_sub=n_sub,
        k=slots // n_sub,
        read_calibration=partial(calibration_ids, opened.tokenizer, options),
        points=options.per_method,
        report=report,
    )


def evaluation_windows(tokenizer: Any, documents: Sequence[str], options: FrontierOptions) -> Windows:
    """Held-out text: the evaluation side, without the documents that the model was calibrated on when it was refactored or pruned."""
    return token_windows(tokenizer, options.source, "evaluation", length=options.length, tokens=options.tokens, exclude=documents)


def _points(chosen: Method, subject: Subject) -> Sequence[NamedPoint]:
    _check_cut(chosen, subject.n_sub)
    return chosen.points(subject)


def _check_cut(chosen: Method, n_sub: int) -> None:
    if chosen.needs_sub_experts and n_sub == 1:
        raise UsageError(
            f"method '{chosen.name}' needs sub-experts, and this model has none",
            "give a folder written by `moe-prism refactor`, or other methods",
        )


def _plain(subject: Subject) -> list[NamedPoint]:
    """Plain top-k' for every k' < k: what `num_experts_per_tok` would do, with weights scaled up where the router scales them."""
    uniform = skip_method("uniform")
    return [NamedPoint(name=f"top-{n}", point=uniform.point(subject, n).point) for n in range(1, subject.k)]


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two points are called '{twice[0]}'", "name a method or a point once")


def _measured(label: str, named: NamedPoint, found: Measurement, slots: int, whole: int, flag: bool) -> MeasuredPoint:
    """slots, whole: of a token at full budget, per layer, and weights of all layers."""
    point, cost, quality = named.point, found.cost, found.quality
    budget = point.slots.budget if not point.routing and point.slots.layers is None else min(cost.k_slots / slots, 1.0)
    share = 1.0 if point.weights is None else change_of(point.weights).resident_share
    if leaves_out_neurons(point):
        share = min(share, cost.active_expert_params / whole)
    return MeasuredPoint(
        name=named.name,
        rule=label,
        budget=min(budget, share),
        k_slots=cost.k_slots,
        ppl=quality.ppl,
        kl=quality.kl,
        top1_agreement=quality.top1_agreement,
        active_expert_params=cost.active_expert_params,
        active_expert_bytes=cost.active_expert_bytes,
        flops_per_token=cost.flops_per_token,
        pareto=flag,
        resident_expert_bytes=found.resident_bytes,
        distinct_expert_bytes=cost.distinct_expert_bytes,
        sends=cost.sends,
        point=point,
        domains={name: DomainQuality(q.ppl, q.kl, q.top1_agreement) for name, q in found.domains.items()},
    )


def _provenance(opened: Opened, options: FrontierOptions, windows: Windows, judged: Judged | None) -> dict[str, Any]:
    manifest: Mapping[str, Any] = opened.manifest or {"calibration": {}}
    return {
        # a file is known by its name: where it lies on this machine is nobody's business
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in recorded(options).items()}
        | {"given": [Path(p).name for p in options.given]},
        "evaluation": {**windows.facts(), "tokens": windows.tokens, "documents": len(windows.documents)},
        **({} if judged is None else {"judge": {"left_out": dict(judged.left_out)}}),
        "calibration": {k: v for k, v in manifest["calibration"].items() if k != "documents"},
        "recovery": [{k: v for k, v in step.items() if k != "inputs"} for step in manifest.get("recovery", [])],
        **recipe_facts(),
        "versions": versions(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
