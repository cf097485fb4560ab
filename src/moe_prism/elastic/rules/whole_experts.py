"""The linear gate of the paper before any fine-tuning: siblings share their parent's score, so whole experts go in rank order."""

from __future__ import annotations

from torch import Tensor

from ..base import Rule, Slots
from .top_slots import top_slots


class WholeExperts(Rule):
    """At K = N k' this is plain top-k' of the source model, without renormalising the weights of what is left."""

    paper = "arXiv 2510.19366"
    needs_norms = False

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        weight = slots.weight.float().abs().masked_fill(~slots.valid, -1.0)
        values = weight[:, :, None].expand(-1, -1, slots.n_sub)
        return top_slots(values, self.count(slots, budget)) & slots.valid[:, :, None]
