"""The mean output of a dropped sub-expert, one vector each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..base import LayerParts, is_compiled
from .base import MIN_ROWS, Blocks, Compensator, ExpertSample, outputs

FEW = 4096  # slots up to which preparing the sum costs more than the sum


class Mean(Compensator):
    """Adds E[output of block n of expert e | it is dropped] times the routing weight: `vectors` [E, N, d]."""

    method = "mean"

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        self.vectors = self.tensor("vectors")

    @classmethod
    def fit(cls, parts: LayerParts, samples: Sequence[ExpertSample], rank: int) -> dict[str, Tensor]:
        vectors = torch.zeros(parts.layer.num_experts, parts.n_sub, parts.layer.hidden)
        for expert, sample in enumerate(samples):
            for n in range(parts.n_sub):
                rows = sample.x[sample.dropped[:, n]]
                if len(rows) >= MIN_ROWS:
                    vectors[expert, n] = outputs(parts, rows, expert, n).mean(0)
        return {"vectors": vectors.bfloat16()}

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
        """As `Compensator` says; for few slots in one call, to the last bit the same."""
        if keep.numel() > FEW or self.parts.layer.down_bias is not None or not is_compiled(weight, self.vectors):
            return super().__call__(x, index, weight, keep)
        from ...kernels.selection import add_dropped  # compiles on first use

        out = np.zeros(x.shape, np.float32)
        add_dropped(index.contiguous().numpy(), weight.contiguous().numpy(), keep.contiguous().numpy(), self.vectors.numpy(), out)
        return torch.from_numpy(out)

    def estimate(self, x: Tensor, expert: int, block: int) -> Tensor:
        return self.vectors[expert, block][None]

    def terms(self, x: Tensor, blocks: Blocks) -> Tensor:
        return blocks.combine(self.vectors.flatten(0, 1))

    def parameters(self) -> tuple[int, int]:
        return self.parts.layer.hidden, 0
