"""Neurons dealt by lot: what the other splits must beat."""

from __future__ import annotations

import torch

from ...compress.split import Deal
from .base import DenseSeen, SplitMethod


class RandomDeal(SplitMethod):
    """A draw per layer, by the seed."""

    def deal(self, seen: DenseSeen) -> Deal:
        order = torch.randperm(seen.neurons, generator=torch.Generator().manual_seed(1000 * seen.seed + seen.layer))
        return Deal(order[: seen.shared], tuple(order[seen.shared :].chunk(seen.experts)))
