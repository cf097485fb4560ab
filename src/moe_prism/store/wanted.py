"""What one step needs at one layer, sorted by key: which rows of the batch want which sub-experts, and how their outputs add up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Wanted:
    """keys [G] ascending; entries [S] (token-key pairs) in key, then token order: those of key g are begin[g]..end[g] - 1."""

    keys: Ints
    begin: Ints
    end: Ints
    row: Ints  # [S] token of an entry
    weight: Floats  # [S] its routing weight
    importance: Floats  # [G] largest |routing weight| of a key

    @classmethod
    def of(cls, index: Tensor, weight: Tensor, keep: Tensor, experts: int, base: int) -> Wanted:
        """index, weight [T, k], keep [T, k, parts] bool (false where index is no expert); base: the layer's first key."""
        arrays = (t.contiguous().numpy() for t in (index, weight.detach().float(), keep))
        return cls(*sort_entries(*arrays, experts, base))

    def __len__(self) -> int:
        return len(self.keys)

    def by_importance(self, first: int, last: int) -> tuple[list[int], list[float]]:
        """Keys first..last - 1 and their importance, the most important first: the order a replay of the trace requests them in."""
        order = np.argsort(-self.importance[first:last], kind="stable") + first
        return self.keys[order].tolist(), self.importance[order].tolist()

    def entries(self, marked: Flags) -> tuple[Ints, Ints]:
        """Entries of the keys that are not marked [G], and of those that are."""
        each = np.repeat(marked, self.end - self.begin) if len(self.row) > len(self.keys) else marked
        return np.flatnonzero(~each), np.flatnonzero(each)

    def of_keys(self, marked: Flags) -> tuple[Wanted, Ints]:
        """The part about marked keys [G], and which entries it consists of."""
        counts = (self.end - self.begin)[marked]
        _, entries = self.entries(marked)
        end = np.cumsum(counts)
        own = Wanted(self.keys[marked], end - counts, end, self.row[entries], self.weight[entries], self.importance[marked])
        return own, entries


@njit(nogil=True, cache=True)
def sort_entries(
    index: Ints, weight: Floats, keep: Flags, experts: int, base: int
) -> tuple[Ints, Ints, Ints, Ints, Floats, Floats]:
    """The fields of `Wanted`."""
    tokens, k, parts = keep.shape
    start = np.zeros(experts * parts + 1, np.int64)
    for t in range(tokens):
        for c in range(k):
            for n in range(parts):
                if keep[t, c, n]:
                    start[index[t, c] * parts + n + 1] += 1
    active = np.flatnonzero(start[1:])
    for g in range(experts * parts):
        start[g + 1] += start[g]
    place = start[:-1].copy()
    row, chosen = np.empty(start[-1], np.int64), np.empty(start[-1], np.float32)
    for t in range(tokens):
        for c in range(k):
            for n in range(parts):
                if keep[t, c, n]:
                    g = index[t, c] * parts + n
                    row[place[g]], chosen[place[g]] = t, weight[t, c]
                    place[g] += 1
    begin, end = start[active], start[active + 1]
    importance = np.zeros(len(active), np.float32)
    for g in range(len(active)):
        for s in range(begin[g], end[g]):
            importance[g] = max(importance[g], abs(chosen[s]))
    return active + base, begin, end, row, chosen, importance


@njit(nogil=True, cache=True)
def add_rows(parts: Floats, row: Ints, out: Floats) -> None:
    """out[row[s]] += parts[s], s ascending: the same sums whatever was computed first. parts [S, d], out [T, d]."""
    for s in range(len(row)):
        t = row[s]
        for j in range(out.shape[1]):
            out[t, j] += parts[s, j]
