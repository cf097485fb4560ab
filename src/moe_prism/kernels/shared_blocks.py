"""Which blocks a batch reads, decided for all its rows at once: the compiled form of `elastic.rules.batch_blocks`, which says what and why.

Shapes: T rows, k experts each, N blocks per expert, B blocks in all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .selection import Flags, Floats, Ints, cutoff_of

Doubles = NDArray[np.float64]


class Shared(NamedTuple):
    """The slots of a batch [T, k, N] with expert ids chosen [T, k], where valid. price: p; rates: g, from 1 on, rising."""

    values: Floats
    chosen: Ints
    valid: Flags
    experts: int
    price: float
    rates: Doubles


@njit(nogil=True, cache=True)
def mark_shared(shared: Shared, cutoffs: Floats, budget: Floats, keep: Flags) -> None:
    """keep [T, k, N] at budgets [T]. cutoffs: at evenly spaced budgets, as `selection.mark_above` takes them."""
    tokens, k, parts = shared.values.shape
    worth = np.full(shared.values.shape, -1.0)
    floor = np.zeros(shared.experts * parts, np.bool_)
    wanted = floor.copy()
    best, own = np.full(tokens, -1), 0
    for t in range(tokens):
        cutoff, top = cutoff_of(cutoffs, budget[t]), np.float32(-1)
        for c in range(k):
            if not shared.valid[t, c]:
                continue
            for n in range(parts):
                value = shared.values[t, c, n]
                worth[t, c, n] = (np.float64(value) / np.float64(cutoff)) ** 2 if cutoff > 0 else np.inf
                if value > top:
                    top, best[t] = value, c * parts + n
        for c in range(k):
            for n in range(parts):
                is_best = c * parts + n == best[t]
                if worth[t, c, n] >= 1 or is_best:
                    block = shared.chosen[t, c] * parts + n
                    own, wanted[block] = own + 1, True
                    floor[block] |= is_best
    limit = shared.price * own + (1 - shared.price) * wanted.sum()
    low, high = 0, len(shared.rates) - 1  # the lowest rate that fits: at the highest, nobody keeps more than for itself
    while low < high:
        middle = (low + high) // 2
        if _use(shared, worth, best, floor, shared.rates[middle], keep) <= limit:
            high = middle
        else:
            low = middle + 1
    _use(shared, worth, best, floor, shared.rates[low], keep)


# Keeps six parameters, all arrays that are used again: a tuple of them would be unpacked anew at every rate.
@njit(nogil=True, cache=True)
def _use(shared: Shared, worth: Doubles, best: Ints, floor: Flags, rate: float, keep: Flags) -> float:
    """Mark what is used at an exchange rate; returns what that costs. worth [T, k, N]; best [T], a slot of each; floor [B]."""
    tokens, k, parts = worth.shape
    least = shared.price * rate
    gain = np.zeros(len(floor))
    for t in range(tokens):
        for c in range(k):
            for n in range(parts):
                if worth[t, c, n] > least:
                    gain[shared.chosen[t, c] * parts + n] += worth[t, c, n] - least
    read = np.empty(len(floor), np.bool_)
    blocks, slots = 0, 0
    for b in range(len(floor)):
        read[b] = floor[b] or gain[b] >= (1 - shared.price) * rate
        blocks += read[b]
    for t in range(tokens):
        for c in range(k):
            for n in range(parts):
                used = worth[t, c, n] >= least or c * parts + n == best[t]
                keep[t, c, n] = used and read[shared.chosen[t, c] * parts + n]
                slots += keep[t, c, n]
    return shared.price * slots + (1 - shared.price) * blocks
