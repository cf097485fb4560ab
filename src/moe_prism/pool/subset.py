"""A subset of options under limits on time and energy: exhaustive search, and branch and bound by monotonicity (after MoE²).

The paper's formulae are not public, so the two limits are ours: a subset takes the time of its slowest option, and the energy of all its
options together. Both only grow with the subset. So does its quality, the mean over questions of the best option for each. That is what
the paper's search rests on.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from .base import Floats, Limits

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


def is_within(seconds: Floats, energy: Floats, limits: Limits, chosen: tuple[int, ...]) -> bool:
    """Whether a subset keeps both limits; seconds, energy: [O]."""
    ids = list(chosen)
    return not ids or (float(seconds[ids].max()) <= limits.seconds and float(energy[ids].sum()) <= limits.energy)


def _key(quality: float, energy: Floats, chosen: tuple[int, ...]) -> tuple[float, float, tuple[int, ...]]:
    """Smaller is better: more quality, then less energy, then the smaller numbers."""
    return -quality, float(energy[list(chosen)].sum()), chosen


def exhaustive(quality: Floats, seconds: Floats, energy: Floats, limits: Limits) -> Subset:
    """The best of all 2^O subsets."""
    best, looked = ((0.0, 0.0, ()), ()), 0
    options = range(quality.shape[1])
    for size in range(1, quality.shape[1] + 1):
        for chosen in combinations(options, size):
            if is_within(seconds, energy, limits, chosen):
                looked += 1
                best = min(best, (_key(subset_quality(quality, chosen), energy, chosen), chosen))
    return Subset(best[1], subset_quality(quality, best[1]), looked)


def branch_and_bound(quality: Floats, seconds: Floats, energy: Floats, limits: Limits) -> Subset:
    """The same subset as `exhaustive`. A branch is left where even all that could still be added does not reach what was found."""
    fits = [o for o in range(quality.shape[1]) if is_within(seconds, energy, limits, (o,))]
    order = sorted(fits, key=lambda o: (-float(quality[:, o].mean()), o))
    best: tuple[tuple[float, float, tuple[int, ...]], tuple[int, ...]] = ((0.0, 0.0, ()), ())
    looked = 0
    stack: list[tuple[tuple[int, ...], int]] = [((), 0)]
    while stack:
        chosen, depth = stack.pop()
        spent = float(energy[list(chosen)].sum())
        left = [o for o in order[depth:] if spent + energy[o] <= limits.energy]
        looked += 1
        if -subset_quality(quality, tuple(sorted({*chosen, *left}))) > best[0][0]:
            continue
        inside = tuple(sorted(chosen))
        if is_within(seconds, energy, limits, inside):
            best = min(best, (_key(subset_quality(quality, inside), energy, inside), inside))
        for i in reversed(range(depth, len(order))):  # the best one alone is looked at first
            grown = (*chosen, order[i])
            if is_within(seconds, energy, limits, grown):
                stack.append((grown, i + 1))
    return Subset(best[1], subset_quality(quality, best[1]), looked)


def select(quality: Floats, seconds: Floats, energy: Floats, limits: Limits) -> Subset:
    """The subset of the highest quality within the limits. quality: [Q, O], 0..1; seconds, energy: [O]."""
    search = exhaustive if quality.shape[1] <= EXHAUSTIVE else branch_and_bound
    return search(np.asarray(quality), np.asarray(seconds), np.asarray(energy), limits)
