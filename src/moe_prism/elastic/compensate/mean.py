"""The mean output of a dropped sub-expert, one vector each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import LayerPlan
from .base import MIN_ROWS, Blocks, Compensator, Sample, outputs


class Mean(Compensator):
    """Adds E[output of block n of expert e | it is dropped] times the routing weight: `vectors` [E, N, d]."""

    method = "mean"

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(plan)
        self.vectors = self.tensor("vectors")

    @classmethod
    def fit(cls, plan: LayerPlan, samples: Sequence[Sample], rank: int) -> dict[str, Tensor]:
        vectors = torch.zeros(plan.layer.num_experts, plan.n_sub, plan.layer.hidden)
        for expert, sample in enumerate(samples):
            for n in range(plan.n_sub):
                rows = sample.x[sample.dropped[:, n]]
                if len(rows) >= MIN_ROWS:
                    vectors[expert, n] = outputs(plan, rows, expert, n).mean(0)
        return {"vectors": vectors.bfloat16()}

    def estimate(self, x: Tensor, expert: int, block: int) -> Tensor:
        return self.vectors[expert, block][None]

    def terms(self, x: Tensor, blocks: Blocks) -> Tensor:
        return blocks.combine(self.vectors.flatten(0, 1))

    def parameters(self, touched: int, dropped: int) -> int:
        return dropped * self.plan.layer.hidden
