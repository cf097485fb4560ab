"""Fit what a store is run with: on one part of a trace, chosen on a second, judged on a third."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import UsageError
from ..offload.cache import cache_policies
from ..offload.keys import KeySpace
from ..offload.predict import Predictor, predictors
from ..offload.quotas import likeliest, miss_curves, needed, quotas, scaled
from ..offload.replay import Group, Prefetch, groups
from ..offload.trace import Array, Trace
from .decisions import Clock, Decisions
from .pools import Eviction, is_shared
from .price_reads import Forecast, ReadPrices, replayed

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
PATIENCE = 2  # widths in a row without gain after which no larger ones are tried
SIZES = 8  # quotas that are tried for a layer
FADE = 0.5  # weight of an expert beyond the k likeliest, of the one before


@dataclass(frozen=True)
class Costs:
    """Seconds that a layer computes and that a record takes to be read; busy: of those, what the computing thread works.

    first: what a layer's reads take beside that, however many there are; uncompiled, guess: see `Decisions`.
    """

    layer: float
    record: float
    busy: float = 0.0
    uncompiled: float = 0.0
    guess: float = 0.0
    first: float = 0.0


@dataclass(frozen=True)
class TracePart:
    """Decode rows of a trace, and the groups that a store would be asked for."""

    rows: Trace
    groups: list[Group]

    @classmethod
    def of(cls, rows: Trace, space: KeySpace) -> TracePart:
        return cls(rows, list(groups(rows, space)))


@dataclass(frozen=True)
class FitWay:
    """One way to run a store; None as predictor: nothing is read ahead, or by none that has been fitted.

    quotas_by: what they follow from, `misses` or `need`.
    """

    policy: str
    settings: dict[str, Any]
    quotas: tuple[int, ...] | None = None
    quotas_by: str = ""
    predictor: str | None = None
    guess: Predictor | None = None
    width: int = 0


class StoreFit:
    """The three parts of a trace, for a store of `slots` records of `space`. clock: tells what deciding takes (`Decisions`)."""

    def __init__(self, trace: Trace, space: KeySpace, slots: int, costs: Costs, clock: Clock = time.perf_counter) -> None:
        self.space, self.slots, self.costs = space, slots, costs
        fitting, choosing = halves(trace.part("calibration").decode())
        self.fitting, self.choosing = TracePart.of(fitting, space), TracePart.of(choosing, space)
        self.judging = TracePart.of(trace.part("evaluation").decode(), space)
        self.group = trace.k * space.parts
        self._values = key_values(fitting, space)
        self._ahead: dict[tuple[int, int], Prefetch] = {}
        self._decisions = Decisions(space, slots, costs.uncompiled, costs.guess, clock)
        self._policy_seconds: dict[str, float] = {}
        self._guess_seconds: dict[int, float] = {}  # by id: predictors live as long as this

    def time(self, way: FitWay, part: TracePart) -> Forecast:
        """What a step of this part takes. A step is a token here: traces decode one at a time."""
        eviction = Eviction(cache_policies.get(way.policy), way.settings, self.group, way.quotas)
        prefetch = replace(self.ahead(way.guess, part), width=way.width) if way.guess is not None and way.width else None
        found = replayed(part.groups, self.space, self.slots, eviction, prefetch)
        prices = ReadPrices(
            [1, 2], [self.costs.first + n * self.costs.record for n in (1, 2)], [self.costs.busy, 2 * self.costs.busy]
        )
        deciding = self._policy(way, eviction) + (0.0 if prefetch is None else self._guess(way))
        return found.at(prices, self.space.layers * self.costs.layer).with_deciding(deciding)

    def _policy(self, way: FitWay, eviction: Eviction) -> float:
        """Seconds of a step that the policy takes itself, measured once."""
        if way.policy not in self._policy_seconds:
            self._policy_seconds[way.policy] = self._decisions.policy(eviction, self.fitting.groups)
        return self._policy_seconds[way.policy]

    def _guess(self, way: FitWay) -> float:
        """Seconds of a step that guessing takes, measured once."""
        assert way.guess is not None
        if id(way.guess) not in self._guess_seconds:
            self._guess_seconds[id(way.guess)] = self._decisions.predictor(way.guess, self.fitting.rows)
        return self._guess_seconds[id(way.guess)]

    def ahead(self, guess: Predictor, part: TracePart) -> Prefetch:
        """What a predictor says of the keys of a part, at width 0."""
        name = id(guess), id(part)  # both live as long as this
        if name not in self._ahead:
            self._ahead = {
                name: read_ahead(guess, part.rows, self._values)
            }  # the last one alone: it is asked for at several widths
        return self._ahead[name]

    def policies(self, names: Sequence[str]) -> Iterator[tuple[FitWay, Forecast]]:
        """Every policy with what it fits. A store gives no hints, so what is fitted for hints is left out."""
        rows = replace(self.fitting.rows, inputs=None, routers=None, logits=None)
        each = self.slots if self.is_shared else max(1, self.slots // self.space.layers)
        for name in names:
            settings = json.loads(json.dumps(cache_policies.get(name).fit(rows, self.space, each)))
            way = FitWay(name, settings)
            yield way, self.time(way, self.choosing)

    @property
    def is_shared(self) -> bool:
        """Whether one pool serves all layers."""
        return is_shared(self.space, self.slots, self.group)

    def with_quotas(self, way: FitWay) -> FitWay:
        """The same with quotas from the miss curves of the fitting part."""
        keys, equal = self.space.experts * self.space.parts, self.slots // self.space.layers
        least = max(1, min(equal, max(self.group, (equal + 1) // 2)))
        sizes = sorted({int(s) for s in np.linspace(least, min(keys, 2 * equal), SIZES)} | {equal})
        curves = miss_curves(self.fitting.rows, cache_policies.get(way.policy), sizes, self.space, way.settings)
        return replace(way, quotas=tuple(scaled(quotas(curves, sizes, self.slots), self.slots, keys)), quotas_by="misses")

    def with_need(self, way: FitWay, guess: Predictor | None) -> FitWay:
        """The same with quotas by the keys that a predictor says the steps of the fitting part need; None: by those that they needed."""
        asked, space = self.fitting.groups, self.space
        keys = space.experts * space.parts
        used = np.zeros((space.layers, asked[-1].step + 1, keys), bool)
        for group in asked:
            used[group.layer, group.step, np.array(group.keys, np.int64) - space.of_layer(group.layer).start] = True
        if guess is not None:
            ahead, rows = self.ahead(guess, self.fitting), [group.first_row for group in asked if not group.layer]
            for layer in range(ahead.first_layer, space.layers):  # what it does not predict is taken as it was
                scores = np.add.reduceat(ahead.scores[:, layer], rows, axis=0)
                used[layer] = likeliest(scores, round(used[layer].sum(1).mean()))
        return replace(way, quotas=tuple(scaled(needed(used, self.slots), self.slots, keys)), quotas_by="need")

    def predictors(self, way: FitWay, names: Sequence[str]) -> Iterator[tuple[FitWay, Forecast]]:
        """The way with every predictor, at its best width, 0 excluded. Those whose inputs the trace lacks are left out."""
        for name in names:
            kind = predictors.get(name)
            if kind.needs_inputs and self.fitting.rows.inputs is None:
                continue
            guess = kind.fit(self.fitting.rows, self.space)
            found: list[tuple[FitWay, Forecast]] = []
            for width in self.widths():
                each = replace(way, predictor=name, guess=guess, width=width)
                found.append((each, self.time(each, self.choosing)))
                if len(found) > PATIENCE and best(found[:-PATIENCE])[1].seconds <= best(found[-PATIENCE:])[1].seconds:
                    break
            yield best(found)

    def widths(self) -> list[int]:
        """Widths worth a look: up to twice what a token wants of a layer."""
        return [width for width in WIDTHS if width <= min(2 * self.group, self.space.experts * self.space.parts)]


def read_ahead(guess: Predictor, rows: Trace, values: tuple[Array, Array]) -> Prefetch:
    """What a predictor says of the keys of a trace, at width 0; values: see `key_values`."""
    return Prefetch(of_keys(guess.scores(rows), values), 0, max(1, guess.first_layer))


def halves(rows: Trace) -> tuple[Trace, Trace]:
    """Every other request: even ones to fit on, odd ones to choose on. UsageError for a single request."""
    _, number = np.unique(rows.request, return_inverse=True)
    if number.max() < 1:
        raise UsageError("the trace has one calibration request, which cannot be parted", "record more --tokens")
    return rows.rows(number % 2 == 0), rows.rows(number % 2 == 1)


def key_values(rows: Trace, space: KeySpace) -> tuple[Array, Array]:
    """(weight [L, E] of the expert that a router ranks r-th, share [L, E, N] of its uses in which a part was kept)."""
    weights = -np.sort(-np.abs(rows.weights.astype(np.float32)), axis=2).mean(0)
    ranked = np.zeros((space.layers, space.experts), np.float32)
    k = min(weights.shape[1], space.experts)
    ranked[:, :k] = np.maximum.accumulate(weights[:, :k][:, ::-1], axis=1)[:, ::-1]
    for rank in range(k, space.experts):
        ranked[:, rank] = FADE * ranked[:, rank - 1]
    shares = np.ones((space.layers, space.experts, space.parts), np.float32)
    if space.parts > 1 and rows.kept is not None:
        bits = (rows.kept[..., None] >> np.arange(space.parts)) & 1
        for layer in range(space.layers):
            ids = np.where(rows.expert_ids[:, layer] < 0, space.experts, rows.expert_ids[:, layer]).reshape(-1).astype(np.int64)
            total = np.bincount(ids, minlength=space.experts + 1)[:-1, None]
            kept = np.zeros((space.experts + 1, space.parts))
            np.add.at(kept, ids, bits[:, layer].reshape(-1, space.parts))
            mean = kept[:-1].sum() / max(1, total.sum() * space.parts)
            shares[layer] = (kept[:-1] + mean) / (total + 1)
    return ranked, shares


def of_keys(scores: Array, values: tuple[Array, Array]) -> Array:
    """[T, L, E * N] the expected value of every key, from scores [T, L, E] of its expert.

    An expert counts by its rank, because only the order of scores means anything. A store runs the layer's own selection on the guessed
    experts instead, so this stands for it.
    """
    ranked, shares = values
    rank = np.argsort(np.argsort(-scores, axis=2, kind="stable"), axis=2)
    value = np.take_along_axis(np.broadcast_to(ranked, scores.shape), rank, axis=2)
    found: Array = (value[..., None] * shares).reshape(*scores.shape[:2], -1)
    return found


def best(found: Sequence[tuple[FitWay, Forecast]]) -> tuple[FitWay, Forecast]:
    """The least time per token; of equal ones the first."""
    return min(found, key=lambda pair: pair[1].seconds)


Told = Callable[[], None]


Tried = list[tuple[FitWay, Forecast]]


def search(fit: StoreFit, policies: Sequence[str], guesses: Sequence[str], must_guess: bool, told: Told) -> tuple[FitWay, Tried]:
    """(the way that takes least on the choosing part, all that were tried). must_guess: keep a predictor where none pays, at width 0."""
    tried = []
    for pair in fit.policies(policies):
        tried.append(pair)
        told()
    way, time = best(tried)
    if not fit.is_shared and fit.slots < len(fit.space):
        other = fit.with_quotas(way)
        tried.append((other, fit.time(other, fit.choosing)))
        if tried[-1][1].seconds < time.seconds:
            way, time = tried[-1]
    ahead: Tried = []
    for pair in fit.predictors(way, guesses):
        ahead.append(pair)
        told()
    tried += ahead
    if ahead and not fit.is_shared and fit.slots < len(fit.space):
        other = fit.with_need(best(ahead)[0], best(ahead)[0].guess)
        ahead.append((other, fit.time(other, fit.choosing)))
        bare = replace(other, predictor=None, guess=None, width=0)
        tried += [ahead[-1], (bare, fit.time(bare, fit.choosing))]
        if tried[-1][1].seconds < time.seconds:
            way, time = tried[-1]
    if ahead and (best(ahead)[1].seconds < time.seconds or must_guess):
        found, pays = best(ahead)[0], best(ahead)[1].seconds < time.seconds
        way = found if pays else replace(way, predictor=found.predictor, guess=found.guess)
    return way, tried
