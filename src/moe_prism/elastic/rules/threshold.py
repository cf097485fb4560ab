"""A level instead of a count: tokens that need more slots get more, and the dial is continuous."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ..base import LayerParts, Rule, Slots, is_compiled
from ..side_tensors import CUTOFFS, POSITIONS, SHARES
from .top_slots import top_slots

QUANTILES = POSITIONS  # quantiles stored per layer


def fit_cutoffs(values: Tensor, importance: Tensor) -> Tensor:
    """cutoffs [129] (float32): level[i] is the value that a share i/128 of the slots reach. values, importance [S]."""
    order = values.argsort(descending=True, stable=True)
    share = importance[order].double().cumsum(0)
    grid = torch.linspace(0, 1, QUANTILES, dtype=torch.float64) * share[-1]
    position = torch.searchsorted(share, grid).clamp(max=len(values) - 1)
    return values[order][position].float()


def dropped_energy(cutoffs: Tensor, budget: float) -> float:
    """Mean squared value of the slots that a budget drops, over all slots, from a layer's own cutoffs."""
    below = cutoffs[round(budget * (QUANTILES - 1)) :].double()
    return float(below.square().sum()) / QUANTILES


def pool_cutoffs(cutoffs: list[Tensor], sensitivity: list[float]) -> list[Tensor]:
    """Levels that spend one budget across all layers, from every layer's own cutoffs and sensitivity c.

    If dropping slots of layer l costs c_l per unit of squared value, a sum of costs under a fixed number of slots is least when the
    slots with the smallest c_l v^2 go first, wherever they are: one level for sqrt(c_l) v. Layers count alike (equal k and N).
    """
    scale = [max(c, 1e-30) ** 0.5 for c in sensitivity]
    pooled = torch.cat([own.double() * s for own, s in zip(cutoffs, scale, strict=True)])
    shared = fit_cutoffs(pooled, torch.ones_like(pooled)).double()
    return [(shared / s).float() for s in scale]


def kept_shares(own: Tensor, pooled: Tensor) -> Tensor:
    """shares [129] (float32): of a layer's slots, by its own cutoffs, those that reach each of its pooled cutoffs."""
    rising, grid = own.double().flip(0), torch.linspace(1, 0, QUANTILES, dtype=torch.float64)
    place = torch.searchsorted(rising, pooled.double()).clamp(1, QUANTILES - 1)
    low, high = rising[place - 1], rising[place]
    part = ((pooled.double() - low) / (high - low).clamp(min=1e-30)).clamp(0, 1)
    shares = torch.lerp(grid[place - 1], grid[place], part)
    shares[0], shares[-1] = 0.0, 1.0
    return shares.cummax(0).values.float()


class Threshold(Rule):
    """Budget b keeps the slots whose value reaches the level that a share b of the calibration slots reached.

    So b of all slots are kept on average, more for tokens that need them, and, where the cutoffs were pooled, more in layers that
    need them. Reads `cutoffs` of the parts. A token always keeps its best slot.
    """

    is_continuous = True
    units: ClassVar[tuple[str, ...]] = ("bytes", "slots")
    controls: ClassVar[tuple[str, ...]] = ("mean", "strict", "none")

    def __init__(self, parts: LayerParts) -> None:
        super().__init__(parts)
        self.cutoffs = parts.tensors[CUTOFFS].to(parts.layer.up.device)
        self.compiled = self.cutoffs.numpy() if self.cutoffs.is_cpu else None

    @classmethod
    def share_kept(cls, parts: LayerParts) -> Tensor:
        """Of the calibration text. UsageError for an artefact that does not say."""
        if SHARES not in parts.tensors:
            raise UsageError(
                "this model was refactored by a version that knew no budgets of bytes, and none that hold",
                "refactor it again, or give a share of the slots with control 'none'",
            )
        return parts.tensors[SHARES].cpu().double()

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        values = slots.values()
        if self.compiled is not None and is_compiled(values, budget):
            from ...kernels.selection import mark_above  # compiles on first use

            keep = torch.empty(values.shape, dtype=torch.bool)
            mark_above(values.numpy(), self.compiled, budget.numpy(), slots.valid.numpy(), keep.numpy())
            return keep
        best = top_slots(values, torch.ones_like(budget, dtype=torch.long))
        return ((values >= self.level(budget)[:, None, None]) | best) & slots.valid[:, :, None]

    def level(self, budget: Tensor) -> Tensor:
        """The level [T] of budgets [T], interpolated between the stored ones as `kernels.selection.cutoff_of` does, to the last bit."""
        position = budget.clamp(0, 1) * (QUANTILES - 1)
        low = position.floor().long()
        below, above = self.cutoffs[low], self.cutoffs[(low + 1).clamp(max=QUANTILES - 1)]
        level = below + (position - low) * (above - below)
        return level.masked_fill(budget >= 1, 0.0)
