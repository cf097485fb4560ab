"""How much a layer turns the residual stream: 1 - cos(h, h + y), h the residual stream and y the layer's routed output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..model import MoELayer
from .base import Collector, Kept, RoutedBatch
from .outputs import each_output


class Rotation(Collector):
    """turned [1]: the sum over tokens (float64); tokens [1] whose residual stream was seen (int64)."""

    needs: ClassVar[frozenset[str]] = frozenset({"residual"})
    keeps: ClassVar[Mapping[str, Kept]] = {"turned": ((1,), torch.float64), "tokens": ((1,), torch.int64)}

    def __init__(self, layer: MoELayer, *, capacity: int, seed: int) -> None:
        super().__init__(layer, capacity=capacity, seed=seed)
        self.turned, self.tokens = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def update(self, batch: RoutedBatch) -> None:
        if batch.residual is None:
            return
        h, total = batch.residual.float(), torch.zeros(batch.x.shape, device=batch.x.device)
        for _, token, choice, out in each_output(self.layer, batch):
            total.index_add_(0, token, out * batch.weight[token, choice, None].float())
        self.turned += (1 - nn.functional.cosine_similarity(h, h + total, dim=1)).double().sum().cpu()
        self.tokens += len(batch.x)

    def state(self) -> dict[str, Tensor]:
        return {"turned": self.turned, "tokens": self.tokens}

    def load(self, state: dict[str, Tensor]) -> None:
        self.turned, self.tokens = state["turned"].clone(), state["tokens"].clone()

    def merge(self, state: dict[str, Tensor]) -> None:
        self.turned, self.tokens = self.turned + state["turned"], self.tokens + state["tokens"]

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return 16
