"""One budget for all tokens of a batch: n experts per token on average, spent where the routing weights are largest.

Alloc-MoE (arXiv 2604.08133), token level: every token gets its best `base` experts (1 is best by its authors), the rest of the layer's
n T goes to the largest weights of the whole batch. A token's result then depends on who shares its batch: for offline work, not for
serving with reproducible answers. Padding takes part like any token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .base import SkipStage, VariantIndex, ranks


class BatchRedistribution(SkipStage):
    """The `base` first experts of every token, and the largest of all others up to sum of n over the tokens."""

    neutral_values: ClassVar[Mapping[str, float]] = {"base": 1.0}
    depends_on_batch = True

    def keeps_all(self, variant: int, layer: int, k: int) -> bool:
        return self.counts.of_variant(variant, layer)[0] >= k  # whatever the base

    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        device, rank = ranked.device, ranks(ranked)
        tokens, k = ranked.shape
        count = self.counts.at(layer, which, device).clamp(max=k)
        base = self.column("base").at(layer, which, device).clamp(min=1)
        # a token whose plan skips nothing neither gives nor takes
        owned = (rank < torch.minimum(base, count)) | (count >= k)
        total = count.expand(tokens, 1).sum().round().long()
        order = ranked.masked_fill(owned, math.inf).flatten().argsort(descending=True, stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=device))
        return (place < total).view(tokens, k)
