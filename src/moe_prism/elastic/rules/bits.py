"""Blocks and bits in one ranking: a slot is read at the width that its value pays for, or not at all.

A slot of value v loses v^2 where it is dropped and a share e_w of that where it is read at w bits, for B_w bytes. The least loss for the
bytes of all slots together takes each step from one width to the next, (e_before - e_w) v^2 for B_w - B_before, if it gains enough per
byte. So each width has a cutoff of its own, a multiple of one that the dial moves. Steps that gain less per byte than the one after them
are never taken: what is left is the lower convex hull.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...point import SlotBits
from ..base import LayerParts, Slots, is_compiled
from ..coded import SOURCE, block_bytes
from ..side_tensors import CUTOFFS
from .threshold import Threshold
from .top_slots import top_slots
from .widths import WidthRule, share_above


class Bits(WidthRule, Threshold):
    """Reads `cutoffs` and `shares` of the parts, as `threshold` does."""

    maker: ClassVar[str] = "moe_prism.methods.slots.bits:BitsMethod"

    def __init__(self, parts: LayerParts, bits: SlotBits) -> None:
        super().__init__(parts)
        self._known, self.compiled = self.compiled, None
        self.steps = hull(parts, bits)
        self._table = np.array(self.steps, np.float32)
        self.bits = bits

    @classmethod
    def least(cls, parts: LayerParts, bits: SlotBits) -> float:
        return hull(parts, bits)[0][0]

    @classmethod
    def spent(cls, parts: LayerParts, bits: SlotBits, sizes: dict[float, float]) -> Tensor:
        cutoffs, shares = parts.tensors[CUTOFFS].cpu().double(), Threshold.share_kept(parts)
        found, before = torch.full_like(cutoffs, sizes[0.0]), sizes[0.0]
        for width, ratio in hull(parts, bits):
            found += (sizes[width] - before) * share_above(cutoffs, shares, cutoffs * ratio)
            before = sizes[width]
        return found

    def widths(self, slots: Slots, budget: Tensor) -> Tensor:
        """A token's best slot has the least bits at least."""
        values = slots.values()
        if self._known is not None and is_compiled(values, budget) and not bool((budget >= 1).any()):
            from ...kernels.selection import mark_widths  # compiles on first use

            out = torch.empty(values.shape)
            mark_widths(values.numpy(), self._known, budget.numpy(), slots.valid.numpy(), self._table, out.numpy())
            return out
        level = self.level(budget)[:, None, None]
        best = top_slots(values, torch.ones_like(budget, dtype=torch.long))
        found = torch.where(best, float(self.steps[0][0]), 0.0)
        for bits, ratio in self.steps:
            found = torch.where(values >= level * ratio, bits, found)
        found = torch.where((budget >= 1)[:, None, None], SOURCE, found)  # the model itself
        return found.masked_fill(~slots.valid[:, :, None], 0.0)


def hull(parts: LayerParts, bits: SlotBits) -> list[tuple[float, float]]:
    """(bits, cutoff as a multiple of the dial's) of the widths worth having, rising; the dial's own is that of reading all of a block."""
    errors = bits.errors[parts.layer.index]
    whole = block_bytes(parts, SOURCE, bits.group)
    steps: list[tuple[float, float, float, float]] = []  # bits, bytes, loss, gain per byte
    for width, error in zip(bits.widths, errors, strict=True):
        size = block_bytes(parts, width, bits.group)
        while True:
            _, before, loss, slope = steps[-1] if steps else (0.0, 0.0, 1.0, float("inf"))
            gain = (loss - error) / (size - before)
            if gain <= slope or not steps:
                break
            steps.pop()
        if gain > 0:
            steps.append((width, size, error, gain))
    steps = steps or [(bits.widths[0], 0.0, 0.0, 1 / whole)]
    return [(width, (1 / (gain * whole)) ** 0.5) for width, _, _, gain in steps]
