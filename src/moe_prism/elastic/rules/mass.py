"""Keep slots until they cover a share of the token's estimated output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Rule, Slots


class Mass(Rule):
    """The budget is the share (0, 1] of the sum of a token's slot values that the kept slots must cover, largest first.

    So how many slots that takes differs per token and is not known before; the frontier reports the measured mean.
    """

    is_continuous = True
    units = ("value",)

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        values = slots.values().clamp(min=0).flatten(1)
        order = values.argsort(dim=1, descending=True, stable=True)
        ranked = values.gather(1, order).double()
        before = ranked.cumsum(1) - ranked
        wanted = before < (budget.double() * ranked.sum(1))[:, None]
        wanted[:, 0] = True
        keep = torch.zeros_like(wanted).scatter_(1, order, wanted).view(*slots.valid.shape, slots.n_sub)
        return (keep | (budget >= 1)[:, None, None]) & slots.valid[:, :, None]
