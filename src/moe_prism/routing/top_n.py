"""Plans of counts: `uniform`, `pattern-skip` and `sensitivity` all run as this."""

from __future__ import annotations

from torch import Tensor

from .base import SkipStage, VariantIndex, ranks


class TopN(SkipStage):
    """A token's n best experts by routing weight."""

    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        return (ranks(ranked) < self.counts.at(layer, which, ranked.device)).expand(ranked.shape)
