"""Decide which experts stay: statistics, protection, criterion, allocation. Nothing here writes a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...calibrate.statistics import Statistics
from ...compress.prune import KeptExperts, LayerSubject, PruneRequest, choose, criteria, protections
from ...compress.prune.change import PruneChange, kept_experts
from ...compress.prune.choose import keep_counts
from ...elastic.runtime import Elastic, experts_per_token
from ...errors import UsageError
from ...frontier.allocation import exact
from ...frontier.measure import measure
from ...model import MoELayer
from ...model.router import Router, RoutingGroups
from ...options.prune import PruneOptions
from ...point import OperatingPoint
from ...progress import Update
from ...schema import read_form
from ...schema.kept import AGAIN, SelectionForm

PROFILE_POINTS = 7  # numbers of kept experts at which a layer is run alone, for `measured`
LOGIT_ROWS = 1024  # tokens whose logits are held at a time
Curve = list[tuple[float, float]]
"""(kept experts, loss) of a layer."""


def check_options(options: PruneOptions) -> None:
    """Raises UsageError for a name or number that cannot work."""
    options.check()
    request_of(options).check()
    if criteria.get(options.criterion).is_blind and options.allocation == "global":
        raise UsageError(f"--criterion {options.criterion} cannot compare layers", "use --allocation layer")
    if options.for_domain and not criteria.get(options.criterion).needs:
        raise UsageError(f"--criterion {options.criterion} reads no text, so --for-domain means nothing", "leave one of them out")


def request_of(options: PruneOptions) -> PruneRequest:
    """The budget, as `choose` takes it."""
    return PruneRequest(options.keep, options.allocation, options.groups, criteria.get(options.criterion).is_absolute)


def collectors_of(options: PruneOptions) -> list[str]:
    """What the pass has to keep."""
    needs = set(criteria.get(options.criterion).needs) | {"outputs" for _ in options.protect[:1]}
    # a profile runs the text of the pass, so `measured` needs one even where the criterion reads nothing
    return sorted(needs | ({"counts"} if options.allocation == "measured" else set()))


@dataclass(frozen=True)
class PruneSelection:
    """What stays of every layer, and why. facts: JSON values; starved: fewest tokens any kept or removed expert was seen with."""

    choices: tuple[KeptExperts, ...]
    names: tuple[str, ...]
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `--kept` reads again."""
        rows = [
            {
                "layer": i,
                "name": name,
                "experts": c.experts,
                "kept": list(c.kept),
                "groups": asdict(c.groups) if c.groups else None,
                "masked": c.masked,
            }
            for i, (name, c) in enumerate(zip(self.names, self.choices, strict=True))
        ]
        return {**self.facts, "resident_share": round(PruneChange(tuple(self.choices)).resident_share, 6), "layers": rows}


def rank(
    layers: Sequence[MoELayer],
    statistics: Statistics | None,
    options: PruneOptions,
    per_token: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """(scores [E], protected [E] bool) of every layer."""
    values = [layer.values for layer in statistics.layers] if statistics else [{} for _ in layers]
    shields = [torch.zeros(layer.num_experts, dtype=torch.bool) for layer in layers]
    for name in options.protect:
        if any("outputs" not in v for v in values):
            raise UsageError(
                "the calibration holds no 'outputs'", "calibrate with --collectors outputs, or leave --calibration out"
            )
        shields = [a | b for a, b in zip(shields, protections.get(name)(values), strict=True)]
    criterion = criteria.get(options.criterion)()
    chosen = domains_of(statistics, options)
    scores = []
    for i, (layer, v, shield) in enumerate(zip(layers, values, shields, strict=True)):
        subject = LayerSubject(layer.index, layer.name, layer.num_experts, per_token, v, shield, options.seed)
        if statistics is None or not chosen:
            scores.append(criterion.scores(subject))
            continue
        by_domain = [statistics.layers[i].domains[name] for name in chosen]
        each = [criterion.scores(replace(subject, values={**v, **own})).double() for own in by_domain]
        # a domain of more tokens, or of larger outputs, would else decide alone (EASY-EP does the same)
        scores.append(torch.stack([s / s.abs().sum().clamp(min=1e-300) for s in each]).mean(0) if len(each) > 1 else each[0])
    return scores, shields


def domains_of(statistics: Statistics | None, options: PruneOptions) -> list[str]:
    """The domains whose scores are averaged; none where the calibration, or what the criterion reads, is of all text together.

    UsageError for a domain that is asked for and not there.
    """
    criterion = criteria.get(options.criterion)
    found = statistics.layers[0].domains if statistics else {}
    usable = [name for name, own in found.items() if criterion.needs and set(criterion.needs) <= set(own)]
    lacking = [name for name in options.for_domain if name not in usable]
    if lacking and statistics:
        if lacking[0] in found:
            raise UsageError(
                f"criterion '{options.criterion}' has no statistics by domain", "use --criterion easy-ep or gate-norm"
            )
        raise UsageError(
            f"the calibration has no domain '{lacking[0]}'",
            f"choose from {', '.join(found)}" if found else f"calibrate with --domain {lacking[0]}=PATH and others",
        )
    return options.for_domain or usable


def decide(
    model: Any,
    layers: Sequence[MoELayer],
    statistics: Statistics | None,
    options: PruneOptions,
    counts: Sequence[int] | None = None,
) -> PruneSelection:
    """The selection of a model whose weights need not be loaded. counts: experts per layer, from `measured_counts`."""
    groups: list[RoutingGroups | None] = []
    for layer in layers:
        router = Router(model, layer)
        if refusal := router.refusal():
            raise UsageError(refusal, "give a model with experts that a router chooses")
        groups.append(router.groups)
    per_token = experts_per_token(model, layers[0])
    scores, shields = rank(layers, statistics, options, per_token)
    choices = choose(scores, request_of(options), per_token, shields, groups, counts)
    facts = {
        "criterion": options.criterion,
        "keep": options.keep,
        "allocation": options.allocation,
        "protected": [[int(e) for e in shield.nonzero().flatten()] for shield in shields],
        **({"domains": chosen} if (chosen := domains_of(statistics, options)) else {}),
        **({"least_tokens": _least_tokens(statistics)} if statistics else {}),
    }
    return PruneSelection(tuple(choices), tuple(layer.name for layer in layers), facts)


def measured_counts(
    model: Any, elastic: Elastic, statistics: Statistics | None, options: PruneOptions, ids: Tensor, update: Update
) -> list[int]:
    """How many experts every layer keeps, so that the sum of what is lost with each layer alone pruned (`loss_curves`) is least."""
    layers = [layer.parts.layer for layer in elastic.layers]
    per_token = experts_per_token(model, layers[0])
    scores, shields = rank(layers, statistics, options, per_token)
    groups = [Router(model, layer).groups for layer in layers]
    total = sum(keep_counts(scores, request_of(options), per_token, shields, groups))
    return spend(loss_curves(model, elastic, scores, shields, ids, update), total)


def loss_curves(
    model: Any, elastic: Elastic, scores: Sequence[Tensor], shields: Sequence[Tensor], ids: Tensor, update: Update
) -> list[Curve]:
    """What the model loses with one layer alone pruned, for every number of kept experts. It does not depend on how many shall stay in all.

    Every layer is run alone at PROFILE_POINTS numbers of kept experts, in the order of the scores, on windows ids [n, length] of
    calibration text; between them the loss (KL to the full model) is interpolated. Routers must have no groups.
    """
    layers = [layer.parts.layer for layer in elastic.layers]
    per_token = experts_per_token(model, layers[0])
    grids = [_grid(max(per_token, int(p.sum())), len(s)) for s, p in zip(scores, shields, strict=True)]
    runs = [(i, n) for i, grid in enumerate(grids) for n in grid]

    def alone(i: int, n: int) -> list[KeptExperts]:
        wanted = [n if j == i else len(s) for j, s in enumerate(scores)]
        return choose(scores, PruneRequest(1.0), per_token, shields, [None] * len(layers), wanted)

    points = [OperatingPoint(weights=PruneChange(tuple(alone(i, n))).part()) for i, n in runs]
    batch = max(1, LOGIT_ROWS // ids.shape[1])
    found = measure(model, ids, points, batch=batch, progress=update)
    losses = {run: each.quality.kl for run, each in zip(runs, found, strict=True)}
    return [_curve([(n, losses[i, n]) for n in grid], len(scores[i])) for i, grid in enumerate(grids)]


def spend(curves: Sequence[Curve], total: int) -> list[int]:
    """Experts per layer, `total` in all, whose losses add up to the least; exact."""
    chosen = exact(curves, total).choices
    return [int(curve[c][0]) for curve, c in zip(curves, chosen, strict=True)]


def _grid(least: int, experts: int) -> list[int]:
    """Numbers of kept experts to measure: evenly from the least on; all of them lose nothing and need no run."""
    return sorted({round(n) for n in np.linspace(least, experts, PROFILE_POINTS + 1)[:-1].tolist()} - {experts})


def _curve(points: Sequence[tuple[int, float]], experts: int) -> Curve:
    """(kept experts, loss) for every number from the least measured on; never rising with the number."""
    known = [*points, (experts, 0.0)]
    grid = list(range(known[0][0], experts + 1))
    losses = np.minimum.accumulate(np.interp(grid, [n for n, _ in known], [loss for _, loss in known]))
    return [(float(n), float(loss)) for n, loss in zip(grid, losses, strict=True)]


def _least_tokens(statistics: Statistics) -> int | None:
    """The fewest tokens any expert was chosen for: a ranking by means says little below some hundred."""
    found = [v for layer in statistics.layers for v in (layer.values.get("outputs"), layer.values.get("counts")) if v]
    return min((int(v["count"].min()) for v in found), default=None)


def read_kept(path: str | Path, model: Any, layers: Sequence[MoELayer]) -> PruneSelection:
    """The selection of a file that `prune` wrote (kept.json). UsageError if it does not fit the model, CorruptError if it is none."""
    form = read_form(SelectionForm, Path(path), AGAIN)
    rows = form.layers
    per_token = experts_per_token(model, layers[0])
    if len(rows) != len(layers):
        raise UsageError(f"{path} has {len(rows)} layers, the model has {len(layers)}", "it was made for another model")
    choices = []
    for layer, row in zip(layers, rows, strict=True):
        if row.experts != layer.num_experts or len(row.kept) < per_token:
            raise UsageError(
                f"{path} does not fit '{layer.name}' of {layer.num_experts} experts", "it was made for another model"
            )
        choices.append(kept_experts(row, str(path)))
    facts = form.model_dump(include={"criterion", "keep", "allocation", "protected", "least_tokens"}, exclude_unset=True)
    return PruneSelection(tuple(choices), tuple(layer.name for layer in layers), facts)
