"""What one step needs at one layer, sorted by key: which rows of the batch want which sub-experts, and how their outputs add up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ...elastic.jobs import group

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Wanted:
    """keys [G] ascending; entries [S] (token-key pairs) in key, then token order: those of key g are begin[g]..end[g] - 1."""

    keys: Ints
    begin: Ints
    end: Ints
    row: Tensor  # [S] token of an entry
    weight: Tensor  # [S] its routing weight
    importance: Floats  # [G] largest |routing weight| of a key

    @classmethod
    def of(cls, index: Tensor, weight: Tensor, keep: Tensor, experts: int, base: int) -> Wanted:
        """index, weight [T, k], keep [T, k, parts] bool (false where index is no expert); base: the layer's first key."""
        row, choice, offset, active, _ = group(index.contiguous().numpy(), keep.contiguous().numpy(), experts)
        chosen = weight.reshape(-1)[torch.from_numpy(choice)].float()
        begin, end = offset[active], offset[active + 1]
        size = np.abs(chosen.numpy())
        importance = np.maximum.reduceat(size, begin) if len(begin) else size[:0]
        return cls(active + base, begin, end, torch.from_numpy(row), chosen, importance)

    def __len__(self) -> int:
        return len(self.keys)

    def by_importance(self, first: int, last: int) -> tuple[list[int], list[float]]:
        """Keys first..last - 1 and their importance, the most important first: the order a replay of the trace requests them in."""
        order = np.argsort(-self.importance[first:last], kind="stable") + first
        return self.keys[order].tolist(), self.importance[order].tolist()


@njit(nogil=True, cache=True)
def add_rows(parts: Floats, row: Ints, out: Floats) -> None:
    """out[row[s]] += parts[s], s ascending: the same sums whatever was computed first. parts [S, d], out [T, d]."""
    for s in range(len(row)):
        t = row[s]
        for j in range(out.shape[1]):
            out[t, j] += parts[s, j]
