"""What deciding costs a step on this machine: a policy that answers in Python, and guessing what to read ahead.

No replay shows it, since nobody waits for a disk there. All of it is the median of short runs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..offload.base import ExpertCache, Key, KeySpace, Moment
from ..offload.cache.lru import LRU
from ..offload.cache.pool import LayerPools
from ..offload.predict import Predictor, Seen
from ..offload.predict.base import history
from ..offload.replay import Group
from ..offload.trace import Trace
from .fast_pool import TablePool
from .pools import Eviction, pools
from .price_reads import ReadPrices, measure_step
from .read_ahead import Guess, ReadAhead

if TYPE_CHECKING:
    from .layer import StoredElastic

Clock = Callable[[], float]
"""Seconds since some beginning."""
REQUESTS, WARM = 96, 32  # of them, those that are not timed: the pool fills
GUESSES, FIRST = 24, 4  # steps that a predictor is timed for, and of them those that are not


class Decisions:
    """Costs of a step of a store of `slots` records. clock: what tells the time.

    uncompiled: seconds that a layer takes more where the policy has no table, its own Python apart (`measure_uncompiled`); guess: seconds
    that a layer takes to choose records among guessed experts (`measure_guess`). Both need a model; 0 is what is known without one.
    """

    def __init__(
        self, space: KeySpace, slots: int, uncompiled: float = 0.0, guess: float = 0.0, clock: Clock = time.perf_counter
    ) -> None:
        self.space, self.slots, self.uncompiled, self.guess, self.clock = space, slots, uncompiled, guess, clock

    def policy(self, eviction: Eviction, asked: Sequence[Group]) -> float:
        """Seconds of a step beyond those of `lru`, 0 with a table. asked: what it is timed with. A policy that knows the future is free."""
        if eviction.policy.needs_future:
            return 0.0
        each = [(group.layer, group.keys, group.weights) for group in asked[:REQUESTS]]
        found = request_seconds(eviction, self.space, self.slots, each, self.clock)
        return 0.0 if found is None else self.space.layers * (self.uncompiled + max(0.0, found[0] - found[1]))

    def predictor(self, guess: Predictor, rows: Trace) -> float:
        """Seconds of a step. rows: decode rows that it is timed with, a step at a time."""
        past = history(rows)
        bounds = np.flatnonzero(np.r_[True, np.diff(rows.step) != 0, True])[: GUESSES + 1].tolist()
        found = []
        for layer in range(max(1, guess.first_layer), rows.layers):
            seconds = []
            for first, last in pairwise(bounds):
                step = slice(first, last)
                inputs = None if rows.inputs is None else rows.inputs[step, layer - 1].astype(np.float32)
                seen = Seen(rows.token[step], past[step], rows.expert_ids[step, :layer], inputs)
                began = self.clock()
                guess.at(layer, seen)
                seconds.append(self.clock() - began)
            found.append(statistics.median(seconds[FIRST:] or seconds) + self.guess)
        return sum(found)


def request_seconds(
    eviction: Eviction,
    space: KeySpace,
    slots: int,
    asked: Iterable[tuple[int, Sequence[Key], Sequence[float]]] | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[float, float] | None:
    """(seconds of a request of a layer under this policy, under `lru` in its table), medians; None where the policy has a table.

    asked: layer, keys and weights of the requests; None: as many keys as a token wants, drawn.
    """
    own = pools(eviction, space, slots)
    if isinstance(_pool(own, 0), TablePool):
        return None
    other = pools(replace(eviction, policy=LRU, settings={}), space, slots)
    each = list(_drawn(space, eviction.group) if asked is None else asked)
    return _median(own, space, each, clock), _median(other, space, each, clock)


def _pool(cache: ExpertCache, layer: int) -> ExpertCache:
    return cache.pools[layer] if isinstance(cache, LayerPools) else cache


def _drawn(space: KeySpace, group: int) -> Iterator[tuple[int, list[Key], list[float]]]:
    draw = random.Random(0)  # noqa: S311 - which keys are asked for
    for number in range(REQUESTS):
        own = space.of_layer(number % space.layers)
        keys = draw.sample(own, max(1, min(group, len(own))))
        yield number % space.layers, keys, [1.0] * len(keys)


def _median(
    cache: ExpertCache, space: KeySpace, asked: Sequence[tuple[int, Sequence[Key], Sequence[float]]], clock: Clock
) -> float:
    """Of requests for as many of the keys as fit."""
    seconds = []
    for number, (layer, keys, weights) in enumerate(asked):
        pool, step = _pool(cache, layer), number // space.layers
        few = slice(0, max(1, getattr(pool, "capacity", len(keys))))
        began = clock()
        if isinstance(pool, TablePool):
            pool.serve(np.array(keys[few], np.int64), np.array(weights[few]), Moment(number, step, layer))
        else:
            pool.request(keys[few], Moment(number, step, layer), weights[few])
        seconds.append(clock() - began)
    return statistics.median(seconds[WARM:] or seconds)


def measure_uncompiled(model: Any, ids: Tensor, prompt: int, prices: ReadPrices, step: float) -> float:
    """Seconds that a layer takes more by parts than in compiled calls. step: seconds of a step in those, see `measure_step`."""
    store = model._moe_prism.store
    store.compiled = False
    try:
        by_parts = measure_step(model, ids, prompt, prices)
    finally:
        store.compiled = True
    return max(0.0, by_parts - step) / float(store.space.layers)


def measure_guess(elastic: StoredElastic, width: int = 8) -> float:
    """Seconds that a layer takes to choose records of the next one, at the operating point that is set."""
    layers, seconds = elastic.layers, []
    ahead = ReadAhead(layers, elastic.store, Guess(width))
    x = torch.randn(GUESSES, 1, layers[0].parts.layer.hidden)
    for row in x:
        for number in range(1, len(layers)):
            began = time.perf_counter()
            ahead.keys(number, row, elastic.misses)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[FIRST:]) if seconds else 0.0
