"""Global top-K over all slots of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Rule, Slots

FEW = 64  # slots of a token up to which counting the larger ones beats a sort


def top_slots(values: Tensor, count: Tensor) -> Tensor:
    """keep [T, k, N]: the count[t] largest of each token's values [T, k, N]; equal values in slot order."""
    flat = values.flatten(1)
    if flat.device.type == "cpu" and flat.dtype == torch.float32 and flat.shape[1] <= FEW:
        from .marks import mark_largest  # compiles on first use

        keep = torch.empty(flat.shape, dtype=torch.bool)
        mark_largest(flat.detach().numpy(), count.numpy(), keep.numpy())
        return keep.view_as(values)
    order = flat.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    return (rank < count[:, None]).view_as(values)


class Product(Rule):
    """value = routing weight x estimated output norm; any K, per token."""

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        return top_slots(slots.values(), self.count(slots, budget)) & slots.valid[:, :, None]
