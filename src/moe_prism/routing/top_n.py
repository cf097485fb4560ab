"""Plans of counts: `uniform`, `pattern-skip` and `sensitivity` all run as this."""

from __future__ import annotations

from torch import Tensor

from .base import PlanIndex, RoutingPolicy, ranks


class TopN(RoutingPolicy):
    """A token's n best experts by routing weight."""

    def kept(self, ranked: Tensor, layer: int, level: PlanIndex) -> Tensor:
        return (ranks(ranked) < self.counts.at(layer, level, ranked.device)).expand(ranked.shape)
