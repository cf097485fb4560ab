"""A subset of options under limits on time and energy: exhaustive search, and branch and bound by monotonicity (after MoE²).

The paper's formulae are not public, so the two limits are ours: a subset takes the time of its slowest option, and the energy of all its
models together. Options that are one model at several levels take its energy once. Both only grow with the subset. So does its quality,
the mean over questions of the best option for each. That is what the paper's search rests on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from .base import Floats, SubsetLimits

EXHAUSTIVE = 12
"""Options up to which all subsets are tried."""


class Subset(NamedTuple):
    """chosen: rising ids; none where no option keeps the limits. looked: subsets whose quality was computed."""

    chosen: tuple[int, ...]
    quality: float
    looked: int


def subset_quality(quality: Floats, chosen: tuple[int, ...]) -> float:
    """Mean over questions of the best of the chosen; quality [Q, O]."""
    return float(quality[:, list(chosen)].max(1).mean()) if chosen else 0.0


class Needs(NamedTuple):
    """What options take. seconds, energy: [O]; owners: [O] the model that each is of: options of one model take the largest energy once."""

    seconds: Floats
    energy: Floats
    owners: Sequence[int]

    @classmethod
    def of(cls, seconds: Floats, energy: Floats, owners: Sequence[int] | None) -> Needs:
        """owners: None: every option is a model of its own."""
        return cls(np.asarray(seconds), np.asarray(energy), range(len(energy)) if owners is None else owners)

    def total(self, chosen: Sequence[int]) -> float:
        """Energy of a subset."""
        each: dict[int, float] = {}
        for o in chosen:
            each[self.owners[o]] = max(each.get(self.owners[o], 0.0), float(self.energy[o]))
        return math.fsum(each.values())

    def fit(self, limits: SubsetLimits, chosen: Sequence[int]) -> bool:
        """Whether a subset keeps both limits."""
        ids = list(chosen)
        return not ids or (float(self.seconds[ids].max()) <= limits.seconds and self.total(ids) <= limits.energy)


Best = tuple[tuple[float, float, tuple[int, ...]], tuple[int, ...]]
NOTHING: Best = ((0.0, 0.0, ()), ())


def _key(quality: float, needs: Needs, chosen: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
    """Smaller is better: more quality, then less energy, then the smaller numbers."""
    return -quality, needs.total(chosen), chosen


def exhaustive(quality: Floats, needs: Needs, limits: SubsetLimits) -> Subset:
    """The best of all 2^O subsets."""
    best, looked = NOTHING, 0
    options = range(quality.shape[1])
    for size in range(1, quality.shape[1] + 1):
        for chosen in combinations(options, size):
            if needs.fit(limits, chosen):
                looked += 1
                best = min(best, (_key(subset_quality(quality, chosen), needs, chosen), chosen))
    return Subset(best[1], subset_quality(quality, best[1]), looked)


def branch_and_bound(quality: Floats, needs: Needs, limits: SubsetLimits) -> Subset:
    """The same subset as `exhaustive`. A branch is left where even all that could still be added does not reach what was found."""
    fits = [o for o in range(quality.shape[1]) if needs.fit(limits, (o,))]
    order = sorted(fits, key=lambda o: (-float(quality[:, o].mean()), o))
    best, looked = NOTHING, 0
    stack: list[tuple[tuple[int, ...], int]] = [((), 0)]
    while stack:
        chosen, depth = stack.pop()
        looked += 1
        left = [o for o in order[depth:] if needs.total((*chosen, o)) <= limits.energy]
        if -subset_quality(quality, tuple(sorted({*chosen, *left}))) > best[0][0]:
            continue
        inside = tuple(sorted(chosen))
        best = min(best, (_key(subset_quality(quality, inside), needs, inside), inside))
        for i in reversed(range(depth, len(order))):  # the best one alone is looked at first
            grown = (*chosen, order[i])
            if needs.fit(limits, grown):
                stack.append((grown, i + 1))
    return Subset(best[1], subset_quality(quality, best[1]), looked)


def select(quality: Floats, seconds: Floats, energy: Floats, limits: SubsetLimits, owners: Sequence[int] | None = None) -> Subset:
    """The subset of the highest quality within the limits. quality: [Q, O], 0..1; seconds, energy: [O].

    owners: [O] the model of each option, where several options are one model.
    """
    search = exhaustive if quality.shape[1] <= EXHAUSTIVE else branch_and_bound
    return search(np.asarray(quality), Needs.of(seconds, energy, owners), limits)
