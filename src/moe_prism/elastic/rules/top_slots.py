"""Global top-K over all slots of a token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..base import Rule, Slots, is_compiled

FEW = 64  # slots of a token up to which counting the larger ones beats a sort


def top_slots(values: Tensor, count: Tensor) -> Tensor:
    """keep [T, k, N]: the count[t] largest of each token's values [T, k, N]; equal values in slot order."""
    flat = values.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    return (rank < count[:, None]).view_as(values)


class TopSlots(Rule):
    """value = routing weight x estimated output norm; any K, per token."""

    compiled = np.empty(0, np.float32)

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        values = slots.values()
        if is_compiled(values, budget) and values[0].numel() <= FEW:
            from ...kernels.selection import mark_largest  # compiles on first use

            keep = torch.empty(values.shape, dtype=torch.bool)
            mark_largest(values.numpy(), budget.numpy(), slots.valid.numpy(), keep.numpy())
            return keep
        return top_slots(values, self.count(slots, budget)) & slots.valid[:, :, None]
