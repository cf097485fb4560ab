"""A price on the first slot of an expert: it sends the token to that expert's device, the next ones do not.

Below full budget a threshold drops slots here and there, and most experts keep one. Half the slots then save half of the multiplications,
but little of what goes over the wire. With u = (v / c)^2, c the cutoff of the token's budget, leaving a slot out costs u and computing it
costs 1. An expert costs `TOLL` on top, once. The least sum has a closed form: an expert is kept where the sum of u - 1 over its slots
with u >= 1 reaches the toll, and then it keeps these slots. Values are those of `threshold`; only the price is another.

Every token decides alone, every expert too. So ranks that hold different experts agree without a word.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..base import LayerParts, Slots
from .threshold import Threshold
from .top_slots import top_slots

TOLL = 8.0
"""What sending a token to an expert costs, in slots at the cutoff."""


class FirstSlot(Threshold):
    """At most the slots that `threshold` keeps; how many fewer is measured. Reads `cutoffs`; a token always keeps its best slot."""

    units: ClassVar[tuple[str, ...]] = ("slots",)
    controls: ClassVar[tuple[str, ...]] = ("none",)

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        self.compiled = None  # the compiled selection knows no experts

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        values = slots.values()
        level = self.level(budget).double()[:, None, None]
        worth = (values.double() / level).square().masked_fill(~slots.valid[:, :, None], 0.0)
        worth = worth.nan_to_num(torch.inf, torch.inf)  # no cutoff: priceless
        paid = (worth - 1).clamp(min=0).sum(2, keepdim=True) >= TOLL
        best = top_slots(values, torch.ones_like(budget, dtype=torch.long))
        return (((worth >= 1) & paid) | best) & slots.valid[:, :, None]
