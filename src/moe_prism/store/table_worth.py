"""What a record of a table is worth, and what a use of it adds: `offload/cache/ranking.py`, compiled. Shapes: n records of a pool."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..offload.base import KeySpace
from ..offload.cache.ranking import (
    BY_AGED_COUNT,
    BY_COUNT_OVER_AGE,
    BY_COUNT_OVER_DISTANCE,
    BY_LOGS,
    BY_MIX,
    BY_PROFILE,
    Ranking,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LAST, USES, IMPORTANT = range(3)
"""Columns of what is counted under BY_MIX. BY_COUNT_OVER_AGE has the count first and the last step second."""


class PoolOrder(NamedTuple):
    """Who leaves a pool. layer_keys: keys of a layer, whose number follows from a key; layers: of the model."""

    ranking: Ranking
    layer_keys: int
    layers: int

    @classmethod
    def of(cls, ranking: Ranking, space: KeySpace) -> PoolOrder:
        return cls(ranking, space.experts * space.parts, space.layers)


class AskedAt(NamedTuple):
    """When something is asked for: the step and layer that run, and the step with which the sequence began."""

    step: int
    layer: int
    began: int


def nothing_counted(count: int, form: int) -> Floats:
    """[count, 3] of records that nobody has asked for."""
    found = np.zeros((count, 3))
    if form in (BY_AGED_COUNT, BY_LOGS):
        found[:] = -np.inf
    if form == BY_MIX:
        found[:, LAST] = -1
    return found


@njit(nogil=True, cache=True)
def add_use(counted: Floats, i: int, weight: float, ranking: Ranking, step: int) -> None:
    """Count one use of a record."""
    form = ranking.form
    if form == BY_COUNT_OVER_DISTANCE:
        counted[i, 0] += 1
    elif form == BY_AGED_COUNT:
        add_aged(counted, i, 0, step / ranking.half_lives[0] + (math.log2(max(weight, 1e-6)) if ranking.weighs else 0.0))
    elif form == BY_COUNT_OVER_AGE:
        counted[i, 0] += 1
        counted[i, 1] = step
    elif form == BY_MIX:
        counted[i, LAST] = step
        counted[i, USES] += 1
        counted[i, IMPORTANT] += weight >= ranking.numbers[0, 4]
    elif form == BY_LOGS:
        for h in range(3):
            add_aged(counted, i, h, step / ranking.half_lives[h])


@njit(nogil=True, cache=True)
def add_aged(counted: Floats, i: int, h: int, new: float) -> None:
    """As `Aged.add`: the logarithm of a sum, and a use now weighs 2^(step / half_life).

    So old counts never have to be scaled down, and the larger of two numbers is the larger count at any step.
    """
    old = counted[i, h]
    counted[i, h] = new if old == -np.inf else max(old, new) + math.log2(1 + 2.0 ** -abs(old - new))


@njit(nogil=True, cache=True)
def worth(counted: Floats, i: int, key: int, order: PoolOrder, now: AskedAt) -> float:
    """Of a record, as the policies' own `worth`."""
    ranking, layer = order.ranking, key // order.layer_keys
    form, numbers = ranking.form, ranking.numbers
    if form == BY_AGED_COUNT:
        return counted[i, 0]  # type: ignore[no-any-return]
    if form == BY_COUNT_OVER_DISTANCE:
        # The layer that has just run comes again only after all others: its distance is that of a whole step, not nothing.
        distance = (layer - now.layer) % order.layers
        return counted[i, 0] / (distance if distance > 0 else order.layers)  # type: ignore[no-any-return]
    if form == BY_COUNT_OVER_AGE:
        return counted[i, 0] / (1 + now.step - counted[i, 1])  # type: ignore[no-any-return]
    if form == BY_PROFILE:
        return numbers[key, 0]  # type: ignore[no-any-return]
    if form == BY_MIX:
        steps = max(1, now.step - now.began + 1)
        recent = (counted[i, LAST] - now.began + 1) / steps if counted[i, LAST] >= 0 else 0.0
        ahead = (layer - now.layer) % order.layers / order.layers
        used = (numbers[0, 1] * counted[i, USES] + numbers[0, 2] * counted[i, IMPORTANT]) / steps
        return numbers[0, 0] * recent + used + numbers[0, 3] * (1 - ahead)  # type: ignore[no-any-return]
    found = 0.0
    if form == BY_LOGS:
        for h in range(3):
            count = 0.0 if counted[i, h] == -np.inf else 2.0 ** (counted[i, h] - now.step / ranking.half_lives[h])
            found += numbers[layer, h] * math.log2(count + ranking.floor)
    return found
