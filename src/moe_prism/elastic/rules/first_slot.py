"""A price on the first slot of a device: it sends the token there, the next ones do not.

Below full budget a threshold drops slots here and there, and most experts keep one. Half the slots then save half of the multiplications,
but little of what goes over the wire. With u = (v / c)^2, c the cutoff of the token's budget, leaving a slot out costs u and computing it
costs 1. A device costs the toll on top, once. The least sum has a closed form: a device is visited where the sum of u - 1 over its slots
with u >= 1 reaches the toll, and then it keeps these slots. Values are those of `threshold`; only the price is another.

Every token decides alone, every device too. So ranks that hold different experts agree without a word.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...point import Toll
from ..base import LayerParts, Slots
from ..counter import device_of
from .threshold import Threshold
from .top_slots import top_slots

TOLL = Toll(price=5.0)
"""What sending a token to an expert costs unless the point says it."""


class FirstSlot(Threshold):
    """At most the slots that `threshold` keeps; how many fewer is measured. Reads `cutoffs`; a token always keeps its best slot."""

    units: ClassVar[tuple[str, ...]] = ("slots",)
    controls: ClassVar[tuple[str, ...]] = ("none",)
    maker: ClassVar[str] = "moe_prism.methods.slots.first_slot:FirstSlotMethod"

    def __init__(self, parts: LayerParts, toll: Toll = TOLL) -> None:
        super().__init__(parts)
        if toll.devices > parts.layer.num_experts:
            raise UsageError(
                f"a toll on {toll.devices} devices, and a layer has {parts.layer.num_experts} experts", "give at most as many"
            )
        self.toll = toll
        self.compiled = None  # the compiled selection knows no experts

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        values = slots.values()
        level = self.level(budget).double()[:, None, None]
        worth = (values.double() / level).square().masked_fill(~slots.valid[:, :, None], 0.0)
        worth = worth.nan_to_num(torch.inf, torch.inf)  # no cutoff: priceless
        gain = (worth - 1).clamp(min=0).sum(2)
        if self.toll.devices:
            place = device_of(slots.index, self.parts.layer.num_experts, self.toll.devices)
            gain = torch.where(place[:, :, None] == place[:, None, :], gain[:, None, :], 0.0).sum(2)
        paid = (gain >= self.toll.price)[:, :, None]
        best = top_slots(values, torch.ones_like(budget, dtype=torch.long))
        return (((worth >= 1) & paid) | best) & slots.valid[:, :, None]
