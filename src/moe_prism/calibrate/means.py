"""The mean output of each expert, and how far its outputs are from it: what a constant in its place gives, and loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ..model import MoELayer
from .added_up import AddedUp
from .base import Kept, RoutedBatch
from .outputs import each_output


class Means(AddedUp):
    """Per expert, over its routed tokens, with o its output before the routing weight g (float64 unless said otherwise).

    count [E] (int64); sum [E, d] Σ o; square [E] Σ‖o‖²; weight [E] Σ g. Per layer: tokens [1] (int64), of all.
    """

    has_domains = True
    keeps: ClassVar[Mapping[str, Kept]] = {
        "count": (("E",), torch.int64),
        "sum": (("E", "d"), torch.float64),
        "square": (("E",), torch.float64),
        "weight": (("E",), torch.float64),
        "tokens": ((1,), torch.int64),
    }

    def update(self, batch: RoutedBatch) -> None:
        found = self.values
        for e, token, choice, out in each_output(self.layer, batch):
            out = out.double()
            found["count"][e] += len(token)
            found["sum"][e] += out.sum(0).cpu()
            found["square"][e] += out.square().sum().cpu()
            found["weight"][e] += batch.weight[token, choice].double().sum().cpu()
        found["tokens"] += len(batch.x)

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return 8 * (layer.num_experts * (layer.hidden + 3) + 1)
