"""Operating points made ready to run on one model: checked, and grouped so that a batch may mix them.

Points that differ in numbers only (budgets, parameters of a stage) form a group and are served by one pass over their tokens, each with
its own numbers. Points that differ in kind are groups of their own; a batch that mixes groups is selected group by group and computed at
once. Shapes: P points, T tokens, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..compress.changes import change_of
from ..errors import UsageError
from ..model.extra import ExtraExperts
from ..point import OperatingPoint, RoutingStage, SlotBits, SlotRule, Toll
from ..routing import Stage, stage_class
from ..routing.base import outside
from .coded import codec_of
from .control import Holding, Past, holdings
from .dial import Dial, dials, spending
from .execute.base import Again
from .host import Host
from .prices import StoredAs
from .rules import rules
from .rules.d2moe import read_rows
from .scorers import scorers
from .side_tensors import REPAIR

MOST_POINTS = 256


@dataclass(frozen=True)
class PointGroup:
    """Points that one pass serves: the same stages, rule, scorer, compensation and control.

    budgets[p][l]: the position of the rule's dial for its point p at layer l. holding: what each layer holds them with, where they are
    held. dials: how a budget of the first point becomes a position, for budgets that are given per token. stored: per layer what a change
    of weights makes of its experts, where the point has one that says so. settings: what the rule is made with.
    """

    stages: tuple[Stage, ...]
    rule: str
    scorer: str
    compensate: bool
    budgets: tuple[tuple[float, ...], ...]
    holding: tuple[Holding, ...] | None = None
    dials: tuple[Dial, ...] = ()
    stored: tuple[StoredAs, ...] | None = None
    settings: SlotBits | Toll | None = None

    @property
    def bits(self) -> SlotBits | None:
        """How slots may be read."""
        return self.settings if isinstance(self.settings, SlotBits) else None

    @property
    def extra(self) -> ExtraExperts | None:
        """Experts that are not weights, which one of the stages brings along."""
        return next((stage.extra for stage in self.stages if stage.extra is not None), None)

    @cached_property
    def depends_on_batch(self) -> bool:
        return rules.get(self.rule).depends_on_batch or any(stage.depends_on_batch for stage in self.stages)

    @cached_property
    def _table(self) -> Tensor:
        return torch.tensor(self.budgets, dtype=torch.float32)

    def budget(self, layer: int, which: int | Tensor) -> float | Tensor:
        """The budget of one point, or of each token's [T]."""
        if isinstance(which, int):
            return self.budgets[which][layer]
        return self._table.to(which.device)[:, layer][which]

    def position(self, layer: int, budget: Tensor) -> Tensor:
        """Positions of the dial for budgets of the first point's kind."""
        return self.dials[layer].at_each(budget) if self.dials else budget

    def is_full(self, layer: int, which: int | Tensor) -> bool:
        """Whether every slot is kept. Points on a GPU are never asked for: that would stop it."""
        if isinstance(which, int):
            return self.budgets[which][layer] >= 1
        if which.device.type != "cpu":
            return all(row[layer] >= 1 for row in self.budgets)
        return all(self.budgets[p][layer] >= 1 for p in torch.unique(which).tolist())


@dataclass(frozen=True)
class Bound:
    """Points ready to run. groups; place[p]: (group, number within it) of point p."""

    points: tuple[OperatingPoint, ...]
    groups: tuple[PointGroup, ...]
    place: tuple[tuple[int, int], ...]

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """PointGroup [P] and number within it [P] of every point."""
        pairs = torch.tensor(self.place, dtype=torch.int64)
        return pairs[:, 0], pairs[:, 1]

    @cached_property
    def bits(self) -> SlotBits | None:
        """How slots may be stored; the same for all points."""
        return next((group.bits for group in self.groups if group.bits is not None), None)

    @property
    def needs(self) -> frozenset[str]:
        """What the stages of all points ask for beside the router's choice."""
        return frozenset().union(*(stage.needs for group in self.groups for stage in group.stages))

    @property
    def depends_on_batch(self) -> bool:
        return any(group.depends_on_batch for group in self.groups)

    @cached_property
    def held(self) -> tuple[int, ...]:
        """Of every point the number of its group, from 1, where its budget is held for the request; else 0."""
        of_point = [(number + 1, self.groups[number], local) for number, local in self.place]
        return tuple(n * (group.holding is not None and min(group.budgets[local]) < 1) for n, group, local in of_point)

    def kinds_of(self, point: int, tokens: int) -> NDArray[np.int64]:
        """[T] of tokens that are all at one point; nobody writes to it."""
        known: dict[tuple[int, int], NDArray[np.int64]] = self._kinds
        if (point, tokens) not in known:
            if len(known) > MOST_POINTS:
                known.clear()
            known[point, tokens] = np.full(tokens, self.held[point], np.int64)
        return known[point, tokens]

    @cached_property
    def _kinds(self) -> dict[tuple[int, int], NDArray[np.int64]]:
        return {}

    @cached_property
    def again(self) -> dict[tuple[int, int | Tensor], Again]:
        """(MoE layer, point) -> what computes that layer when all tokens are at that point; layers fill it."""
        return {}

    @cached_property
    def holds(self) -> bool:
        """Whether any point's budget is held."""
        return any(self.held)

    @cached_property
    def follows(self) -> bool:
        """Whether it matters which tokens are of one request: a budget is held, or a stage asks for what came before."""
        return self.holds or "past" in self.needs

    @cached_property
    def holds_several(self) -> bool:
        """Whether points of several groups are held."""
        return len({number for number in self.held if number}) > 1

    def check_which(self, which: int | Tensor) -> None:
        """UsageError for a point that does not exist. Indices on a GPU are not asked for."""
        wrong = outside(which, len(self.points))
        if wrong is not None:
            raise UsageError(f"there is no operating point {wrong}", f"give a number from 0 to {len(self.points) - 1}")


@dataclass
class Step:
    """What the next forward runs at. which: the point of all tokens, or of each token of the flattened batch [T].

    budget: one per token [T] in place of the points' own; `bound` has one point then. past: what the requests of the forward that runs
    have had so far, where a budget is held; None: every token is the first of a request of its own. adapter: the number of the fine-tune
    whose experts all tokens have, or each of them [T]; -1: the model's own.
    """

    bound: Bound
    which: int | Tensor = 0
    budget: Tensor | None = None
    past: Past | None = None
    adapter: int | Tensor = -1

    @property
    def is_plain(self) -> bool:
        """Whether no token has an adapter."""
        return type(self.adapter) is int and self.adapter < 0

    @property
    def is_one(self) -> bool:
        """Whether all tokens are at one of the points."""
        return self.budget is None and type(self.which) is int

    def kinds(self, tokens: int) -> NDArray[np.int64]:
        """[T]: by which group, from 1, each token's budget is held; 0: by none."""
        if isinstance(self.which, int):
            kinds = self.bound.kinds_of(self.which, tokens)
        else:
            kinds = np.array(self.bound.held, np.int64)[self.which.reshape(-1).cpu().numpy()]
        return kinds if self.budget is None else kinds * (self.budget.reshape(-1).cpu().numpy() < 1)


def depends_on_batch(point: OperatingPoint) -> bool:
    """Whether what a token gets at a point depends on the other tokens of its batch."""
    return rules.get(point.slots.rule).depends_on_batch or any(stage_class(s.stage).depends_on_batch for s in point.routing)


def leaves_out_neurons(point: OperatingPoint) -> bool:
    """Whether a token gets only a part of the neurons of its blocks."""
    return any("neurons" in stage_class(stage.stage).needs for stage in point.routing)


def multiplies_inside(point: OperatingPoint) -> bool:
    """Whether a token's experts multiply what they read by numbers of the token's own."""
    return any("factors" in stage_class(stage.stage).needs for stage in point.routing)


def refuse_with_adapters(point: OperatingPoint) -> None:
    """UsageError for a point that does not go with adapters."""
    if point.weights is not None and change_of(point.weights).touches_weights:
        raise UsageError("the point changes the weights, and adapters are changes of their own", "leave one of them out")
    if point.slots.bits is not None:
        raise UsageError("the point stores slots otherwise, and adapters are stored as they are", "leave one of them out")
    if leaves_out_neurons(point):
        raise UsageError("the point leaves out single neurons, which is not computed with adapters", "use a skip plan")
    if multiplies_inside(point):
        raise UsageError("the point multiplies inside its experts, which is not computed with adapters", "use a skip plan")


def bind(elastic: Host, points: Sequence[OperatingPoint]) -> Bound:
    """Check points against a model and group them. UsageError names the part that does not fit, and why."""
    if not 0 < len(points) <= MOST_POINTS:
        raise UsageError(f"{len(points)} operating points at once", f"give 1 to {MOST_POINTS}")
    settled = [_settled(elastic, point) for point in points]
    keys = _group_keys(settled)
    groups: list[PointGroup] = []
    place: list[tuple[int, int]] = [(0, 0)] * len(points)
    for number, key in enumerate(dict.fromkeys(keys)):
        mine = [p for p, own in enumerate(keys) if own == key]
        for local, p in enumerate(mine):
            place[p] = (number, local)
        groups.append(_group(elastic, key, [settled[p] for p in mine]))
    if len({(group.bits.widths, group.bits.group) for group in groups if group.bits is not None}) > 1:
        raise UsageError("points that store slots in different ways cannot share a batch", "run them one after the other")
    return Bound(tuple(points), tuple(groups), tuple(place))


Key = tuple[tuple[tuple[str, bool | None], ...], str, str, bool, str, SlotBits | Toll | None]
"""Stages with what they do to weights, rule, scorer, compensation, control, settings."""


def _group_keys(points: Sequence[OperatingPoint]) -> list[Key]:
    """What each point's group is told by. A point that keeps all slots goes with any other of the same stages: its rule does nothing."""
    stages = [tuple((s.stage, s.keep_mass) for s in point.routing) for point in points]
    home: dict[tuple[tuple[str, bool | None], ...], Key] = {}
    keys: list[Key] = []
    for point, own in zip(points, stages, strict=True):
        key = (own, point.slots.rule, point.slots.scorer, point.slots.compensate, point.slots.control, point.slots.settings)
        if not point.slots.is_full:
            home.setdefault(own, key)
        keys.append(key)
    return [home.get(own, key) if p.slots.is_full else key for p, own, key in zip(points, stages, keys, strict=True)]


def _group(elastic: Host, key: Key, points: Sequence[OperatingPoint]) -> PointGroup:
    _, rule, scorer, compensate, control, settings = key
    stages = tuple(
        stage_class(points[0].routing[i].stage)([point.routing[i] for point in points]) for i in range(len(points[0].routing))
    )
    if sum(stage.extra is not None for stage in stages) > 1:
        raise UsageError("two routing stages bring experts of their own", "chain at most one of them")
    chosen = [point for point in points if not point.slots.is_full]
    stored = _stored(elastic, points[0])
    if not chosen:
        whole = tuple((1.0,) * len(elastic.layers) for _ in points)
        return PointGroup(stages, rule, scorer, compensate, whole, stored=stored, settings=settings)
    counts = rules.get(rule)
    plain = control == "none" and all(point.slots.of != "bytes" for point in chosen)
    found = [] if plain else [spending(layer, chosen[0].slots, counts, elastic, stored) for layer in elastic.layers]
    turned = {p: dials(elastic, point.slots, counts, found) for p, point in enumerate(points) if not point.slots.is_full}
    budgets = tuple(_positions(point.slots, turned.get(p), len(elastic.layers)) for p, point in enumerate(points))
    holding = None if control == "none" else holdings(found, control == "strict")
    own = tuple(next(iter(turned.values())))
    return PointGroup(stages, rule, scorer, compensate, budgets, holding, own, stored, settings)


def _stored(elastic: Host, point: OperatingPoint) -> tuple[StoredAs, ...] | None:
    """What a change of weights makes of every layer's experts; None: nothing that prices know. Such a point shares no batch."""
    if point.weights is None:
        return None
    change, layers = change_of(point.weights), elastic.source_layers()
    size = elastic.stored_bytes_per_weight
    found = [
        StoredAs(change.bytes_per_weight(layers, i, size), change.neurons_there(layers, i), change.same_weights(layers, i))
        for i in range(len(layers))
    ]
    return tuple(found) if any(value is not None for own in found for value in own) else None


def _positions(slots: SlotRule, own: Sequence[Dial] | None, layers: int) -> tuple[float, ...]:
    """Of the dial at every layer."""
    return tuple(slots.at(layer) if own is None else own[layer].at(slots.at(layer)) for layer in range(layers))


def _settled(elastic: Host, point: OperatingPoint) -> OperatingPoint:
    """The point with everything decided that it leaves to the model. UsageError for what the model cannot run."""
    if point.decoding is not None:
        raise UsageError(
            f"'{point.decoding.method}' decodes a request, and this runs single forwards",
            "use `moe-prism generate`, or leave decoding out of the operating point",
        )
    if point.slots.layers is not None and len(point.slots.layers) != len(elastic.layers):
        raise UsageError(
            f"the operating point has budgets for {len(point.slots.layers)} MoE layers, the model has {len(elastic.layers)}",
            "make one for this model",
        )
    elastic.check(point)
    if elastic.woven:
        refuse_with_adapters(point)
    rule = rules.get(point.slots.rule)
    scorers.get(point.slots.scorer)
    for what, asked, legal in (("of", point.slots.of, rule.units), ("control", point.slots.control, rule.controls)):
        if asked not in legal:
            raise UsageError(
                f"rule '{point.slots.rule}' has no '{asked}' for '{what}' of its budget", f"choose one of: {', '.join(legal)}"
            )
    if point.slots.bits is not None:
        _check_bits(elastic, point)
    if not point.slots.is_full and rule.needs_norms and elastic.layers[0].parts.n_sub == 1:
        raise UsageError(
            f"rule '{point.slots.rule}' needs sub-experts, and this model has none", "refactor it first, or leave slots out"
        )
    if not point.slots.is_full and rule.needs_norms:
        elastic.layers[0].scorer(point.slots.scorer)  # refuses what the model's side tensors do not hold
    for stage in point.routing:
        kind = stage_class(stage.stage)
        stage.check(len(elastic.layers), elastic.layers[0].parts.layer.num_experts if kind.adds else elastic.k)
    if leaves_out_neurons(point) or multiplies_inside(point):
        _check_inside(elastic, point)
    stages = tuple(_with_weights(elastic, stage) for stage in point.routing)
    return replace(point, routing=stages)


def _check_inside(elastic: Host, point: OperatingPoint) -> None:
    """UsageError where experts cannot compute otherwise inside than they are."""
    cut, first = leaves_out_neurons(point), elastic.layers[0]
    what = "the point leaves out single neurons" if cut else "the point multiplies inside its experts"
    if cut and multiplies_inside(point):
        raise UsageError(f"{what}, and multiplies inside the others", "chain one of the two stages")
    if not first.executor.skips_neurons:
        raise UsageError(f"{what}, which is not computed where this model's experts are", "run it on a model in memory")
    if point.weights is not None or point.slots.bits is not None:
        raise UsageError(f"{what}, and also stores the experts otherwise", "leave one of them out")
    if cut and any(layer.parts.layer.gate is None for layer in elastic.layers):
        raise UsageError(f"{what} by their gates, and the experts of this model have none", "use a skip plan")
    if any(REPAIR in layer.parts.tensors for layer in elastic.layers):
        raise UsageError(f"{what}, and this folder is repaired for blocks alone", "use the folder it was recovered from")


def _check_bits(elastic: Host, point: OperatingPoint) -> None:
    bits = point.slots.bits
    assert bits is not None
    codec_of(bits.widths).check(bits.widths[-1], bits.group)
    if len(bits.errors) != len(elastic.layers):
        raise UsageError(
            f"the bits of the slots are for {len(bits.errors)} MoE layers, the model has {len(elastic.layers)}",
            "make a point for it",
        )
    if bits.router is not None:
        for own, text in zip(elastic.layers, bits.router.rows, strict=True):
            read_rows(text, own.parts.layer)
    if point.weights is not None and change_of(point.weights).touches_weights:
        raise UsageError("both the weights and the slots of a point have their own bits", "leave one of them out")


def _with_weights(elastic: Host, stage: RoutingStage) -> RoutingStage:
    return stage if stage.keep_mass is not None else replace(stage, keep_mass=elastic.normalises())
