"""How large each channel is of what an expert reads: what methods that weigh weights by their inputs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ..model import MoELayer
from .added_up import AddedUp
from .base import Kept, RoutedBatch


class Inputs(AddedUp):
    """Per expert, over its routed tokens: sq Σx² [E, d] (float64), count [E] (int64)."""

    has_domains = True
    keeps: ClassVar[Mapping[str, Kept]] = {"sq": (("E", "d"), torch.float64), "count": (("E",), torch.int64)}

    def update(self, batch: RoutedBatch) -> None:
        size = batch.x.float().square()
        for e in range(self.layer.num_experts):
            token, _ = torch.where(batch.index == e)
            self.values["sq"][e] += size[token].double().sum(0).cpu()
            self.values["count"][e] += len(token)

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts * (8 * layer.hidden + 8)
