"""How often, and with what weight, each expert is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..model import MoELayer
from .base import Collector, Kept, RoutedBatch


class ChoiceCounts(Collector):
    """count [E] (int64), weight_sum [E] (float64), tokens [1]."""

    has_domains = True
    keeps: ClassVar[Mapping[str, Kept]] = {
        "count": (("E",), torch.int64),
        "weight_sum": (("E",), torch.float64),
        "tokens": ((1,), torch.int64),
    }

    def __init__(self, layer: MoELayer, *, capacity: int, seed: int) -> None:
        super().__init__(layer, capacity=capacity, seed=seed)
        self.count = torch.zeros(layer.num_experts, dtype=torch.int64)
        self.weight_sum = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.tokens = torch.zeros(1, dtype=torch.int64)

    def update(self, batch: RoutedBatch) -> None:
        valid = (batch.index >= 0) & (batch.index < self.layer.num_experts)
        index = batch.index[valid].cpu()
        self.count += torch.bincount(index, minlength=self.layer.num_experts)
        self.weight_sum.index_add_(0, index, batch.weight[valid].double().cpu())
        self.tokens += batch.x.shape[0]

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, "weight_sum": self.weight_sum, "tokens": self.tokens}

    def load(self, state: dict[str, Tensor]) -> None:
        self.count, self.weight_sum, self.tokens = (state[k].clone() for k in ("count", "weight_sum", "tokens"))

    def merge(self, state: dict[str, Tensor]) -> None:
        self.count, self.weight_sum, self.tokens = (
            mine + state[k] for k, mine in (("count", self.count), ("weight_sum", self.weight_sum), ("tokens", self.tokens))
        )

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts * 16 + 8
