"""The product rule with a number of slots of its own per layer: more where calibration says they matter, as asked for on average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UsageError
from ..base import LayerParts, Rule, Slots
from ..side_tensors import LAYER_BUDGETS
from .top_slots import top_slots


def budget_steps(order: Sequence[int], layers: int) -> list[Tensor]:
    """Per layer `layer_budgets` [S] (float32, rising): the budgets from which on it keeps 1, 2, ... S slots per token.

    order: the layer that gets the next slot per token, from nothing to all slots; every layer comes S times. So the budgets of the layers
    have the dial as their mean wherever the dial is a whole number of slots, and none falls as the dial rises.
    """
    # half a slot early: a dial meant to be m slots in all is one whatever its rounding
    steps: list[list[float]] = [[] for _ in range(layers)]
    for place, layer in enumerate(order):
        steps[layer].append((place + 0.5) / len(order))
    return [torch.tensor([0.0, *own[1:]], dtype=torch.float32) for own in steps]


class LayerBudgets(Rule):
    """The K_l best slots of every token by routing weight x estimated output norm. Reads `layer_budgets` of the layer's tensors."""

    is_continuous = True

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        if LAYER_BUDGETS not in parts.tensors:
            raise UsageError(
                "this model has no budgets per layer",
                "refactor it with --profile-tokens above 0 and without --low-memory, or use --rule product",
            )
        self.steps = parts.tensors[LAYER_BUDGETS].to(parts.layer.up.device)

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        share = torch.searchsorted(self.steps, budget.float(), right=True) / len(self.steps)
        return top_slots(slots.values(), self.count(slots, share)) & slots.valid[:, :, None]
