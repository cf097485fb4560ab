"""XShare (arXiv 2602.07265): a step first picks the experts that it reads, and every token chooses among them.

A share of the experts is read: every token's first one, then those with the largest sums of probability over the tokens of the batch. A
token takes its best n of them by its own probabilities, also such as its router did not choose. This is the paper's plain form for one
device, without its hierarchy for drafts and its balance over devices. What a token gets depends on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from ...point import RoutingStage
from ...routing.base import Routed, Stage, VariantIndex, ranks
from ..base import Subject
from .base import Fitted, SkipMethod, all_experts, given


class SharedChoice(Stage):
    """A share of the experts is read, those that the batch scores highest together; every token takes its best n of them."""

    paper = "arXiv 2602.07265"
    neutral_values: ClassVar[Mapping[str, float]] = {"share": 1.0}
    neutral_from: ClassVar[frozenset[str]] = frozenset({"share"})
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    depends_on_batch = True

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        scores = routed.scores()[:, : routed.experts].float()
        chosen = (routed.index >= 0) & (routed.index < routed.experts)
        there = chosen.any(1)
        size = routed.weight.float().masked_fill(~chosen, 0.0)
        top = torch.where(
            there, scores.gather(1, routed.index.clamp(0, routed.experts - 1)).masked_fill(~chosen, -1).argmax(1), 0
        )
        first = routed.index.gather(1, top[:, None]).clamp(0, routed.experts - 1)[:, 0]
        summed = (scores * there[:, None]).sum(0)
        wanted = torch.zeros(routed.experts, dtype=torch.bool, device=scores.device).index_put((first,), there, accumulate=True)
        order = torch.where(wanted, torch.inf, summed).argsort(descending=True, stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(routed.experts, device=order.device))
        share = self.column("share").at(routed.layer, which, scores.device)[..., :1].reshape(-1)
        read = (place[None] < (share * routed.experts).ceil()[:, None]) | wanted[None]
        n = routed.index.shape[1]
        values, index = scores.masked_fill(~read, -1.0).topk(n, dim=1)
        keep = (values >= 0) & there[:, None] & (ranks(values) < self.counts.at(routed.layer, which, scores.device))
        held = scores.gather(1, routed.index.clamp(0, routed.experts - 1)).masked_fill(~chosen, 0.0).sum(1, keepdim=True)
        kept = values.masked_fill(~keep, 0.0)
        base = kept.sum(1, keepdim=True) if self.keep_mass else held
        weight = kept * (size.sum(1, keepdim=True) / base.clamp(min=torch.finfo(torch.float32).tiny))
        return replace(routed, index=index.masked_fill(~keep, -1), weight=weight.to(routed.weight.dtype))


class XShare(SkipMethod):
    """A mean of m of k experts stands for the share m / k of a layer's experts, which is what a step reads."""

    paper = "arXiv 2602.07265"
    needs = ("router probabilities",)
    depends_on_batch = True
    stage: ClassVar[type[SharedChoice]] = SharedChoice

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        mean = given(self.name, mean)
        parameters = {"share": ((mean / subject.k,),) * subject.layers}
        return Fitted(RoutingStage(layers=all_experts(subject), stage="xshare", parameters=parameters), mean)

    def means(self, subject: Subject) -> Sequence[float | None]:
        return [mean for mean in super().means(subject) if mean is not None]
