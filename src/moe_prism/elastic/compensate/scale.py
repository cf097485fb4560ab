"""Kept sub-experts are scaled up for the dropped ones of the same expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import LayerParts
from .base import MIN_ROWS, Blocks, Compensator, ExpertSample, outputs


class Scale(Compensator):
    """Multiplies the routing weight of expert e with m of its blocks kept by `factors` [E, N + 1], 1 at m = N.

    Least squares over the sampled rows that keep m blocks: factor = sum <whole, kept> / sum <kept, kept>, the bias being part of both.
    """

    method = "scale"

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        self.factors = self.tensor("factors")

    @classmethod
    def fit(cls, parts: LayerParts, samples: Sequence[ExpertSample], rank: int) -> dict[str, Tensor]:
        factors = torch.ones(parts.layer.num_experts, parts.n_sub + 1)
        for expert, sample in enumerate(samples):
            kept = torch.zeros(len(sample.x), parts.layer.hidden, device=sample.x.device)
            if parts.layer.down_bias is not None:
                kept += parts.layer.down_bias[expert].float()
            whole = kept.clone()
            for n in range(parts.n_sub):
                y = outputs(parts, sample.x, expert, n)
                whole += y
                kept += y * ~sample.dropped[:, n, None]
            count = (~sample.dropped).sum(1)
            for m in range(1, parts.n_sub):
                rows = count == m
                if int(rows.sum()) >= MIN_ROWS:
                    factors[expert, m] = (whole[rows] * kept[rows]).sum() / (kept[rows].square().sum() + 1e-30)
        return {"factors": factors.bfloat16()}

    def weights(self, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
        factor = self.factors[index.clamp(0, self.parts.layer.num_experts - 1), keep.sum(2)]
        return (weight * factor).to(weight.dtype)

    def estimate(self, x: Tensor, expert: int, block: int) -> None:
        return None

    def terms(self, x: Tensor, blocks: Blocks) -> None:
        return None

    def parameters(self) -> tuple[int, int]:
        return 0, 1
