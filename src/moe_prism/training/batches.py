"""Windows of training text: every stretch once per epoch, in an order that follows from the seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Batches:
    """ids [n]: one stream of tokens. A batch [B, L + 1] follows from its step alone, so that a run can go on at any step."""

    def __init__(self, ids: Tensor, length: int, batch: int, seed: int) -> None:
        self.ids, self.length, self.batch, self.seed = ids, length, batch, seed
        self.windows = (len(ids) - 1) // length

    def __call__(self, step: int) -> Tensor:
        """The windows of a step, each with the token after it."""
        epoch, start = divmod(step * self.batch, self.windows - self.windows % self.batch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
        rows = order[start : start + self.batch] * self.length
        return torch.stack([self.ids[r : r + self.length + 1] for r in rows.tolist()]).long()
