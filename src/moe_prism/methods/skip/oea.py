"""OEA (opportunistic expert activation, arXiv 2511.02237): experts that a step reads anyway are nearly free for every token of it.

Every token keeps its first `base` experts. What they name together is read, and a token then also takes those of its own k that are in
this union. What a token gets depends on who shares its batch. Rows without an expert, such as those of other points, take no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...point import RoutingStage
from ...routing.base import Routed, SkipStage, VariantIndex, ranks
from ..base import Subject
from .base import Fitted, SkipMethod, all_experts, given


class OpportunisticUnion(SkipStage):
    """The `base` first experts of every token, and those of its choice that some token's first ones name; at most the layer's n."""

    paper = "arXiv 2511.02237"
    neutral_values: ClassVar[Mapping[str, float]] = {"base": 0.0}
    depends_on_batch = True

    def keeps_all(self, variant: int, layer: int, k: int) -> bool:
        return self.column("base").of_variant(variant, layer)[0] <= 0 and self.counts.of_variant(variant, layer)[0] >= k

    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        """The first ones alone; what the union adds is up to the ids."""
        base = self.column("base").at(layer, which, ranked.device)
        base = torch.where(base > 0, base, float(ranked.shape[1]))
        return ((ranks(ranked) < base) | (ranks(ranked) < 1)).expand(ranked.shape)

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        index, weight = routed.index, routed.weight
        chosen = (index >= 0) & (index < routed.experts)
        ranked, order = self.rank_by(routed).masked_fill(~chosen, -1.0).sort(dim=1, descending=True, stable=True)
        own = torch.zeros_like(chosen).scatter_(1, order, self.kept(ranked, routed.layer, which)) & chosen
        read = index.new_zeros(routed.experts, dtype=torch.bool)
        read = read.index_put((index.clamp(0, routed.experts - 1),), own, accumulate=True)
        allowed = (ranks(ranked) < self.counts.at(routed.layer, which, ranked.device)).expand(ranked.shape)
        within = torch.zeros_like(chosen).scatter_(1, order, allowed)
        keep = own | (read[index.clamp(0, routed.experts - 1)] & chosen & within)
        left = self._weights(weight, weight.float().abs().masked_fill(~chosen, 0.0), keep)
        return replace(routed, index=index.masked_fill(~keep, -1), weight=left)


class Oea(SkipMethod):
    """The mean is the number of first experts that a token names: it computes those, and what others of its choice are read anyway."""

    paper = "arXiv 2511.02237"
    depends_on_batch = True
    stage: ClassVar[type[OpportunisticUnion]] = OpportunisticUnion

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        mean = given(self.name, mean)
        if mean != int(mean):
            raise UsageError(f"method 'oea' cannot name {mean:g} experts", "give a whole number")
        parameters = {"base": ((mean,),) * subject.layers}
        return Fitted(RoutingStage(layers=all_experts(subject), stage="oea", parameters=parameters), mean)

    def means(self, subject: Subject) -> Sequence[float | None]:
        return sorted({mean for mean in super().means(subject) if mean is not None and mean == int(mean)}, reverse=True)
