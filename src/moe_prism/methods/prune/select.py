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
from ...compress.prune.choice import keep_counts
from ...compress.prune.constants import mean_outputs
from ...elastic.runtime import Elastic, experts_per_token
from ...errors import UsageError
from ...frontier.allocation import exact
from ...frontier.measure import measure
from ...model import MoELayer
from ...model.router import Router, RoutingGroups
from ...options.prune import ExpertForm, PruneOptions
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
    if options.keep_format and form_of(options) == "constant":
        raise UsageError("vLLM takes no constants beside quantized experts", "leave --keep-format out, or use --form removed")
    if options.for_domain and not criteria.get(options.criterion).needs:
        raise UsageError(f"--criterion {options.criterion} reads no text, so --for-domain means nothing", "leave one of them out")


def form_of(options: PruneOptions) -> ExpertForm:
    """What is left of an expert that goes."""
    return options.form or criteria.get(options.criterion).form


def request_of(options: PruneOptions) -> PruneRequest:
    """The budget, as `choose` takes it."""
    return PruneRequest(options.keep, options.allocation, options.groups, criteria.get(options.criterion).is_absolute)


def collectors_of(options: PruneOptions) -> list[str]:
    """What the pass has to keep."""
    needs = set(criteria.get(options.criterion).needs) | {"outputs" for _ in options.protect[:1]}
    needs |= {"means"} if form_of(options) == "constant" else set()
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
    form = form_of(options)
    groups: list[RoutingGroups | None] = []
    for layer in layers:
        router = Router(model, layer)
        if refusal := router.refusal():
            raise UsageError(refusal, "give a model with experts that a router chooses")
        groups.append(router.groups if form == "removed" else None)
    per_token = experts_per_token(model, layers[0])
    scores, shields = rank(layers, statistics, options, per_token)
    choices = choose(scores, request_of(options), least_kept(form, per_token), shields, groups, counts)
    if form == "constant" and statistics:
        choices = with_constants(choices, statistics)
    facts = {
        "criterion": options.criterion,
        "form": form,
        "keep": options.keep,
        "allocation": options.allocation,
        "protected": [[int(e) for e in shield.nonzero().flatten()] for shield in shields],
        **({"domains": chosen} if (chosen := domains_of(statistics, options)) else {}),
        **({"least_tokens": _least_tokens(statistics)} if statistics else {}),
    }
    return PruneSelection(tuple(choices), tuple(layer.name for layer in layers), facts)


def least_kept(form: ExpertForm, per_token: int) -> int:
    """The fewest experts that a layer may keep: constants fill the places of a token, and one expert has to be there (vLLM)."""
    return 1 if form == "constant" else per_token


def with_constants(choices: Sequence[KeptExperts], statistics: Statistics) -> list[KeptExperts]:
    """The same with the mean outputs of the experts that go in their place. UsageError where the calibration has none."""
    if any("means" not in layer.values for layer in statistics.layers):
        raise UsageError("the calibration holds no 'means'", "calibrate with --collectors ...,means, or leave --calibration out")
    return [
        replace(choice, constants=mean_outputs(layer.values["means"], choice.gone) if choice.gone else None)
        for choice, layer in zip(choices, statistics.layers, strict=True)
    ]


def measured_counts(
    model: Any, elastic: Elastic, statistics: Statistics | None, options: PruneOptions, ids: Tensor, update: Update
) -> list[int]:
    """How many experts every layer keeps, so that the sum of what is lost with each layer alone pruned (`loss_curves`) is least."""
    layers = [layer.parts.layer for layer in elastic.layers]
    per_token, form = experts_per_token(model, layers[0]), form_of(options)
    scores, shields = rank(layers, statistics, options, per_token)
    groups = [Router(model, layer).groups if form == "removed" else None for layer in layers]
    total = sum(keep_counts(scores, request_of(options), least_kept(form, per_token), shields, groups))
    constants = statistics if form == "constant" else None
    return spend(loss_curves(model, elastic, (scores, shields), ids, update, constants), total)


def loss_curves(
    model: Any,
    elastic: Elastic,
    ranking: tuple[Sequence[Tensor], Sequence[Tensor]],
    ids: Tensor,
    update: Update,
    constants: Statistics | None = None,
) -> list[Curve]:
    """What the model loses with one layer alone pruned, for every number of kept experts. It does not depend on how many shall stay in all.

    Every layer is run alone at PROFILE_POINTS numbers of kept experts, in the order of the scores, on windows ids [n, length] of
    calibration text; between them the loss (KL to the full model) is interpolated. Routers must have no groups. ranking: what `rank`
    gave; constants: whose means take the places of experts, None where nothing does.
    """
    layers = [layer.parts.layer for layer in elastic.layers]
    scores, shields = ranking
    least = least_kept("constant" if constants else "removed", experts_per_token(model, layers[0]))
    grids = [_grid(max(least, int(p.sum())), len(s)) for s, p in zip(scores, shields, strict=True)]
    runs = [(i, n) for i, grid in enumerate(grids) for n in grid]

    def alone(i: int, n: int) -> list[KeptExperts]:
        wanted = [n if j == i else len(s) for j, s in enumerate(scores)]
        found = choose(scores, PruneRequest(1.0), least, shields, [None] * len(layers), wanted)
        return with_constants(found, constants) if constants else found

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
    names = ("outputs", "counts", "means")
    found = [v for layer in statistics.layers for v in (layer.values.get(name) for name in names) if v]
    return min((int(v["count"].min()) for v in found), default=None)


def read_kept(path: str | Path, model: Any, layers: Sequence[MoELayer]) -> PruneSelection:
    """The selection of a file that `prune` wrote (kept.json). UsageError if it does not fit the model, CorruptError if it is none."""
    form = read_form(SelectionForm, Path(path), AGAIN)
    rows = form.layers
    least = least_kept(form.form, experts_per_token(model, layers[0]))
    if len(rows) != len(layers):
        raise UsageError(f"{path} has {len(rows)} layers, the model has {len(layers)}", "it was made for another model")
    choices = []
    for layer, row in zip(layers, rows, strict=True):
        if row.experts != layer.num_experts or len(row.kept) < least:
            raise UsageError(
                f"{path} does not fit '{layer.name}' of {layer.num_experts} experts", "it was made for another model"
            )
        choices.append(kept_experts(row, str(path)))
    facts = form.model_dump(include={"criterion", "form", "keep", "allocation", "protected", "least_tokens"}, exclude_unset=True)
    return PruneSelection(tuple(choices), tuple(layer.name for layer in layers), facts)
