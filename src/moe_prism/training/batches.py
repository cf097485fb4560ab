"""Which examples a step sees: every one once per epoch, in an order that follows from the seed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def drawn(step: int, batch: int, count: int, seed: int) -> NDArray[np.int64]:
    """The numbers [B] of a step's examples among `count`. They follow from the step alone, so that a run can go on at any step."""
    epoch, start = divmod(step * batch, count - count % batch)
    found: NDArray[np.int64] = np.random.default_rng([seed, epoch]).permutation(count)[start : start + batch]
    return found


class Batches:
    """ids [n]: one stream of tokens, cut into windows. A batch is [B, L + 1]."""

    def __init__(self, ids: Tensor, length: int, batch: int, seed: int) -> None:
        self.ids, self.length, self.batch, self.seed = ids, length, batch, seed
        self.windows = (len(ids) - 1) // length

    def __call__(self, step: int) -> Tensor:
        """The windows of a step, each with the token after it."""
        rows = drawn(step, self.batch, self.windows, self.seed) * self.length
        return torch.stack([self.ids[r : r + self.length + 1] for r in rows.tolist()]).long()


class RowBatches:
    """rows [N, n]: one example each. A batch is [B, n]."""

    def __init__(self, rows: Tensor, batch: int, seed: int) -> None:
        self.rows, self.batch, self.seed = rows, batch, seed

    def __call__(self, step: int) -> Tensor:
        """The rows of a step."""
        return self.rows[torch.from_numpy(drawn(step, self.batch, len(self.rows), self.seed))]
