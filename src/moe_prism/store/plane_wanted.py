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
NO_WEIGHTS: Floats = np.empty(0, np.float32)


@dataclass(frozen=True)
class PlaneWanted:
    """Slots [S] in order of their sub-expert, then token: those of sub-expert block[g] are begin[g]..end[g] - 1.

    bits [S]: the width of each; both [G]: whether anybody reads the lower plane. record [K]: numbers within the layer of the records that
    are wanted, ascending, 2 block for the upper plane and 2 block + 1 for the lower one; those of sub-expert g end at ends[g];
    importance [K]: the largest |routing weight| that asks for each.
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
    record: Ints
    ends: Ints
    importance: Floats

    @classmethod
    def of(cls, index: Tensor, weight: Tensor, widths: Tensor, experts: int) -> PlaneWanted:
        """index, weight [T, k]; widths [T, k, N]: bits, 0 where a slot is dropped or index is no expert."""
        arrays = (t.contiguous().numpy() for t in (index, weight.detach().float(), widths.float()))
        return cls(index, weight, widths, *sort_slots(*arrays, experts))

    def records(self, base: int, first: int = 0, last: int | None = None) -> Wanted:
        """The records of sub-experts first..last - 1, as a fetcher is asked for them. base: the layer's first key."""
        part = slice(int(self.ends[first - 1]) if first else 0, len(self.record) if last is None else int(self.ends[last - 1]))
        return Wanted(base + self.record[part], NONE, NONE, NONE, NO_WEIGHTS, self.importance[part])

    def late(self, loads: Ints) -> Flags:
        """[S]: slots of a sub-expert of which a record is still to come. loads: numbers of those records, ascending."""
        either = np.zeros(len(self.block), bool)
        either[np.searchsorted(self.block, loads // 2)] = True
        return np.repeat(either, self.end - self.begin)

    def pieces(self, most: int) -> Iterator[tuple[int, int]]:
        """Runs of sub-experts first..last - 1 of at most `most` records, in order. most: 2 or more."""
        first, done = 0, 0
        while first < len(self.ends):
            last = int(np.searchsorted(self.ends, done + most, side="right"))
            yield first, last
            first, done = last, int(self.ends[last - 1])


@njit(nogil=True, cache=True)
def sort_slots(
    index: Ints, weight: Floats, widths: Floats, experts: int
) -> tuple[Ints, Ints, Ints, Ints, Floats, Ints, Flags, Ints, Ints, Floats]:
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
    both, ends = np.zeros(len(active), np.bool_), np.empty(len(active), np.int64)
    record, importance = np.empty(2 * len(active), np.int64), np.zeros(2 * len(active), np.float32)
    count = 0
    for g in range(len(active)):
        record[count] = 2 * active[g]
        lower = np.float32(0)
        for s in range(begin[g], end[g]):
            importance[count] = max(importance[count], abs(chosen[s]))
            if bits[s] > UPPER:
                both[g], lower = True, max(lower, abs(chosen[s]))
        count += 1
        if both[g]:
            record[count], importance[count] = 2 * active[g] + 1, lower
            count += 1
        ends[g] = count
    return active, begin, end, row, chosen, bits, both, record[:count], ends, importance[:count]
