"""The levels that are served: per-token points of the folder's measured frontier, or a few budgets measured once at start."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint import check_listed, put_file, read_manifest
from ...checkpoint.manifest import MANIFEST
from ...elastic import Elastic
from ...elastic.bind import depends_on_batch, leaves_out_neurons
from ...elastic.dial import affordable
from ...elastic.paged_past import keeps_every_token
from ...elastic.runtime import slots_per_token
from ...errors import CorruptError, UsageError
from ...frontier import Frontier, MeasuredPoint, pareto
from ...model.hub import lies_in_cache
from ...point import FULL, OperatingPoint, RoutingStage
from ...point.named import source_of
from ...schedule.base import Ladder, Level
from ...schema import read_form
from ...schema.points import MEASURE, LadderForm, LevelForm

logger = logging.getLogger(__name__)

TOP = "full"
MEASURED = "ladder.json"
FRONTIER = "frontier.json"
BUDGETS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)

Refusal = Callable[[OperatingPoint], str | None]
"""Why an engine cannot run a point; None if it can."""


def find_ladder(folder: Path, full_slots: int, refusal: Refusal, asked: Sequence[str] = ()) -> tuple[Ladder | None, str]:
    """(ladder, where from): the frontier's points, else an earlier measurement; None if there is neither.

    asked: names of points: those are served and no others; or the path of another frontier.json. A file means what the folder's own
    frontier means without: the Pareto set of the points that can share a batch. UsageError for a name that is not there, a named point
    that this engine cannot run, with the reason, or a file of which nothing can be served.
    """
    if asked:
        source = source_of(folder, asked)
        if asked[0].endswith(".json"):
            points = _best(Frontier.load(source), refusal, logging.WARNING)
            if not points:
                raise UsageError(f"no operating point of {source} can be a level here", "the log names each with its reason")
            return climb((_level(p) for p in points), full_slots), source.name
        points = _named(Frontier.load(source), asked, refusal)
        ladder = climb((_level(p) for p in points), full_slots)
        _check_all_served(points, ladder)
        return ladder, source.name
    frontier = folder / FRONTIER
    if frontier.exists():
        _check_own(folder, frontier)
        points = _best(Frontier.load(frontier), refusal)
        if points:
            return climb((_level(p) for p in points), full_slots), frontier.name
    measured = folder / MEASURED
    if measured.exists():
        _check_own(folder, measured)
        return climb(_read_levels(measured), full_slots), measured.name
    return None, ""


def _check_own(folder: Path, file: Path) -> None:
    """CorruptError for a file that the folder's prism.json lists otherwise. One that it does not list was put there by somebody."""
    if (folder / MANIFEST).is_file() and file.name in (manifest := read_manifest(folder))["files"]:
        check_listed(folder, manifest, [file.name])


def _read_levels(path: Path) -> list[Level]:
    form = read_form(LadderForm, path, MEASURE)
    names = [TOP, *(row.name for row in form.levels)]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CorruptError(f"{path}: two levels are called '{twice}'", MEASURE)
    return [_read_level(row) for row in form.levels]


def _best(frontier: Frontier, refusal: Refusal, loudness: int = logging.INFO) -> list[MeasuredPoint]:
    """The points of a frontier that can share a batch and that none of the others beats. What was left out is logged, by name."""
    fit: list[MeasuredPoint] = []
    for p in frontier.every:
        reason = _reason(p, refusal)
        if reason is None and p.point is not None and depends_on_batch(p.point):
            reason = "what a token gets depends on its batch"
        if reason is None and p.point is not None and p.point.slots.bits is not None:
            reason = "planes of its widths would lie beside the model's weights, which the server has not counted"
        if reason is None and p.point is not None and leaves_out_neurons(p.point):
            reason = "whole blocks are multiplied for its neurons, which saves nothing"
        if reason:
            logger.log(loudness, "operating point %s is not served: %s", p.name, reason)
        elif p.point is not None and not p.point.is_full:
            fit.append(p)
    flags = pareto([p.active_expert_bytes for p in fit], [p.kl for p in fit])
    return [p for p, flag in zip(fit, flags, strict=True) if flag]


def _named(frontier: Frontier, asked: Sequence[str], refusal: Refusal) -> list[MeasuredPoint]:
    """The points of these names, which the frontier has. UsageError for one that cannot be served."""
    known: dict[str, MeasuredPoint] = {}
    for p in frontier.every:
        known.setdefault(p.name, p)
    for name in asked:
        reason = _reason(known[name], refusal)
        if reason:
            raise UsageError(f"operating point '{name}' cannot be served here: {reason}", "leave it out of --points")
        point = known[name].point
        if point is not None and depends_on_batch(point):
            logger.warning("operating point %s: what a token gets depends on the other tokens of its batch", name)
    return [known[name] for name in asked]


def _check_all_served(points: Sequence[MeasuredPoint], ladder: Ladder) -> None:
    """UsageError for a point that was asked for and is not a level: a level that costs more than another must be better than it."""
    served = {level.name for level in ladder.levels}
    for p in points:
        if p.name not in served and p.point is not None and not p.point.is_full:
            better = next((level.name for level in ladder.levels if level.quality >= p.top1_agreement), TOP)
            raise UsageError(
                f"operating point '{p.name}' cannot be a level beside '{better}', which keeps no more slots and is no worse",
                "leave one of them out of --points",
            )


def _reason(p: MeasuredPoint, refusal: Refusal) -> str | None:
    """Why a point cannot be one of several in a batch."""
    if p.point is None:
        return "an earlier version measured it and did not say how it runs; measure it again"
    if not p.point.is_per_token:
        return "it changes the weights or the decoding, not single tokens"
    return refusal(p.point)


def _level(p: MeasuredPoint) -> Level:
    assert p.point is not None
    return Level(p.name, p.point, p.k_slots, p.top1_agreement)


def _read_level(row: LevelForm) -> Level:
    """One entry of `ladder.json`; version 0.1 wrote a budget of the threshold rule."""
    point = FULL.with_slots(row.budget or 1.0) if row.point is None else OperatingPoint.of_form(row.point)
    return Level(row.name, point, float(row.slots), float(row.quality))


def climb(levels: Iterable[Level], full_slots: int) -> Ladder:
    """The levels sorted, without those that cost more and give no more, and the full model on top."""
    kept: list[Level] = []
    for level in sorted(levels, key=lambda level: (level.slots, -level.quality)):
        below = not level.point.is_full and level.slots < full_slots and level.quality < 1
        if below and (not kept or (level.quality > kept[-1].quality and level.slots > kept[-1].slots)):
            kept.append(level)
    return Ladder((*kept, Level(TOP, FULL, float(full_slots), 1.0)))


def fewer_experts(elastic: Elastic) -> list[tuple[str, OperatingPoint]]:
    """(name, point) for every number of experts per token below the model's own, as its router scales their weights."""
    layers, experts = len(elastic.layers), elastic.k or 1
    stages = [(n, RoutingStage(layers=(n,) * layers, stage="top-n", keep_mass=elastic.normalises())) for n in range(1, experts)]
    return [(f"top-{n}", OperatingPoint(routing=(stage,))) for n, stage in stages]


def _budgets(model: Any) -> list[tuple[str, OperatingPoint]]:
    """Points of sub-experts, whose names say what they are found to keep."""
    control = "" if keeps_every_token(model) else "none"
    return [("", FULL.with_budget(budget, control=control)) for budget in affordable(model._moe_prism, BUDGETS)]


def measure_ladder(model: Any, tokenizer: Any, folder: Path, tokens: int = 4096) -> Ladder:
    """Measure a few budgets, or fewer experts where they are not cut, on held-out text; kept beside a model of ours that can be written."""
    from ...data import token_windows
    from ...frontier.measure import measure
    from ...jobs.which_text import default_source

    elastic, manifest = model._moe_prism, read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    if elastic.layers[0].parts.n_sub == 1 and not fewer_experts(elastic):
        return climb([], slots_per_token(elastic))  # one expert per token, or dense: there is nothing to measure
    exclude = manifest.get("calibration", manifest).get("documents", ())
    windows = token_windows(tokenizer, default_source(folder), "evaluation", length=512, tokens=tokens, exclude=exclude)
    named = _budgets(model) if elastic.layers[0].parts.n_sub > 1 else fewer_experts(elastic)
    found = measure(model, windows.ids, [point for _, point in named])
    levels = [
        Level(name or f"{point.slots.rule}-{one.cost.k_slots:.3g}", point, one.cost.k_slots, one.quality.top1_agreement)
        for (name, point), one in zip(named, found, strict=True)
    ]
    ladder = climb(levels, slots_per_token(elastic))
    if not manifest or lies_in_cache(folder):
        return ladder
    rows = {"levels": [level.to_json() for level in ladder.levels[:-1]], "tokens": windows.tokens, "text": windows.source}
    try:
        put_file(folder / MEASURED, (json.dumps(rows, indent=1) + "\n").encode())  # `verify` knows every file of the folder
    except (OSError, UsageError) as error:  # a read-only model, or one at which another run is, is measured again next time
        logger.info("the measured points are not kept: %s", error)
    return ladder
