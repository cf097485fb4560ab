"""A level instead of a count: tokens that need more slots get more, and the dial is continuous."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LayerPlan, Rule, Slots
from .product import top_slots

LEVELS = 129  # quantiles stored per layer


def fit_levels(values: Tensor, importance: Tensor) -> Tensor:
    """levels [129] (float32): level[i] is the value that a share i/128 of the slots reach. values, importance [S]."""
    order = values.argsort(descending=True, stable=True)
    share = importance[order].double().cumsum(0)
    grid = torch.linspace(0, 1, LEVELS, dtype=torch.float64) * share[-1]
    position = torch.searchsorted(share, grid).clamp(max=len(values) - 1)
    return values[order][position].float()


class Threshold(Rule):
    """Budget b keeps the slots whose value reaches the level that a share b of the calibration slots reached.

    So b of all slots are kept on average, more for tokens that need them. Reads `levels` of the plan. A token always keeps its best
    slot.
    """

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(plan)
        self.levels = plan.tensors["levels"].to(plan.layer.up.device)

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        values = slots.values()
        position = budget.clamp(0, 1) * (LEVELS - 1)
        low = position.floor().long()
        level = torch.lerp(self.levels[low], self.levels[(low + 1).clamp(max=LEVELS - 1)], position - low)
        level = level.masked_fill(budget >= 1, 0.0)
        keep = (values >= level[:, None, None]) | top_slots(values, torch.ones_like(low))
        return keep & slots.valid[:, :, None]
