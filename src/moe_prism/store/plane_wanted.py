"""What one step needs of a layer whose records are planes: which slots at which width, and so which records.

Shapes: T tokens, k experts per token, E experts, N sub-experts per expert, S slots, G sub-experts that are wanted, K records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numba import njit
from torch import Tensor

from ..elastic.planes import UPPER
from .wanted import Flags, Floats, Ints, Wanted

NONE: Ints = np.empty(0, np.int64)


@dataclass(frozen=True)
class PlaneWanted:
    """Slots [S] in order of their sub-expert, then token: those of sub-expert block[g] are begin[g]..end[g] - 1.

    bits [S]: the width of each; both [G]: whether anybody reads the lower plane; importance [G, 2]: the largest |routing weight| that
    asks for either plane. Record numbers within the layer are 2 block and 2 block + 1.
    """

    index: Tensor  # [T, k], weight [T, k] and widths [T, k, N]: as they were asked
    weights: Tensor
    widths: Tensor
    block: Ints
    begin: Ints
    end: Ints
    row: Ints
    weight: Floats
    bits: Ints
    both: Flags
    importance: Floats

    @classmethod
    def of(cls, index: Tensor, weight: Tensor, widths: Tensor, experts: int) -> PlaneWanted:
        """index, weight [T, k]; widths [T, k, N]: bits, 0 where a slot is dropped or index is no expert."""
        arrays = (t.contiguous().numpy() for t in (index, weight.detach().float(), widths.float()))
        return cls(index, weight, widths, *sort_slots(*arrays, experts))

    def records(self, base: int, first: int = 0, last: int | None = None) -> Wanted:
        """The records of sub-experts first..last - 1, as a fetcher is asked for them. base: the layer's first key."""
        part = slice(first, len(self.block) if last is None else last)
        asked = np.stack([np.ones_like(self.both[part]), self.both[part]], 1)
        keys = base + (2 * self.block[part, None] + np.arange(2))[asked]
        return Wanted(keys, NONE, NONE, NONE, np.empty(0, np.float32), self.importance[part][asked])

    def pieces(self, most: int) -> Iterator[tuple[int, int]]:
        """Runs of sub-experts first..last - 1 of at most `most` records, in order. most: 2 or more."""
        ends = np.cumsum(1 + self.both)
        first, done = 0, 0
        while first < len(ends):
            last = int(np.searchsorted(ends, done + most, side="right"))
            yield first, last
            first, done = last, int(ends[last - 1])


@njit(nogil=True, cache=True)
def sort_slots(
    index: Ints, weight: Floats, widths: Floats, experts: int
) -> tuple[Ints, Ints, Ints, Ints, Floats, Ints, Flags, Floats]:
    """The fields of `PlaneWanted` from `block` on."""
    tokens, k, parts = widths.shape
    start = np.zeros(experts * parts + 1, np.int64)
    for t in range(tokens):
        for c in range(k):
            for n in range(parts):
                if widths[t, c, n] > 0:
                    start[index[t, c] * parts + n + 1] += 1
    active = np.flatnonzero(start[1:])
    for g in range(experts * parts):
        start[g + 1] += start[g]
    place = start[:-1].copy()
    row, chosen, bits = np.empty(start[-1], np.int64), np.empty(start[-1], np.float32), np.empty(start[-1], np.int64)
    for t in range(tokens):
        for c in range(k):
            for n in range(parts):
                if widths[t, c, n] > 0:
                    g = index[t, c] * parts + n
                    row[place[g]], chosen[place[g]], bits[place[g]] = t, weight[t, c], int(widths[t, c, n])
                    place[g] += 1
    begin, end = start[active], start[active + 1]
    both, importance = np.zeros(len(active), np.bool_), np.zeros((len(active), 2), np.float32)
    for g in range(len(active)):
        for s in range(begin[g], end[g]):
            size = abs(chosen[s])
            importance[g, 0] = max(importance[g, 0], size)
            if bits[s] > UPPER:
                both[g], importance[g, 1] = True, max(importance[g, 1], size)
    return active, begin, end, row, chosen, bits, both, importance
