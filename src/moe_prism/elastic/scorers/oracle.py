"""True norms of what dropping a block loses: the best any scorer of norms can do, at the price of computing everything."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..base import LayerParts, Scorer, per_expert
from ..compensate import compensator
from .ridge import block_norms


class Oracle(Scorer):
    """For analysis: what a perfect norm predictor would reach. With compensation the norm is that of the remaining error."""

    reads_all: ClassVar[bool] = True

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        extra = compensator(parts)
        self.losses = extra.losses if extra else lambda x, expert: block_norms(parts, x, expert)

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        parts = self.parts
        return per_expert(index, parts.layer.num_experts, lambda e, tokens: self.losses(x[tokens], e), parts.n_sub)

    def parameters_per_expert(self) -> int:
        return self.parts.layer.parameters_per_expert()

    @property
    def reads_gates(self) -> bool:
        return False  # the whole expert is counted above
