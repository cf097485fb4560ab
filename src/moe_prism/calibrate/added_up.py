"""Statistics that are a value per name, of a fixed shape, and that add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..model import MoELayer
from .base import Collector, Kept


class AddedUp(Collector):
    """Holds what `keeps` says, from zero on; two passes are the sum of both, and the larger of both for `peaks`."""

    peaks: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layer: MoELayer, *, capacity: int, seed: int) -> None:
        super().__init__(layer, capacity=capacity, seed=seed)
        self.values = zeros(self.keeps, layer)

    def state(self) -> dict[str, Tensor]:
        return dict(self.values)

    def load(self, state: dict[str, Tensor]) -> None:
        self.values = {name: state[name].clone() for name in self.values}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in what another pass over other tokens found."""
        for name, mine in self.values.items():
            self.values[name] = torch.maximum(mine, state[name]) if name in self.peaks else mine + state[name]


def zeros(keeps: Mapping[str, Kept], layer: MoELayer) -> dict[str, Tensor]:
    """Statistics of nothing yet, in the shapes that are kept."""
    sizes = {"E": layer.num_experts, "d": layer.hidden, "f": layer.width}
    return {
        name: torch.zeros([end if isinstance(end, int) else sizes[end] for end in shape], dtype=dtype)
        for name, (shape, dtype) in keeps.items()
    }
