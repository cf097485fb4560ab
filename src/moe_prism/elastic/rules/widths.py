"""What rules share that give every slot a width of its own: their budget counts bytes, and the point says what they know."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ...point import SlotBits
from ..base import LayerParts, Rule, Slots


class WidthRule(Rule):
    """Made with the point's `SlotBits`."""

    is_continuous = True
    units: ClassVar[tuple[str, ...]] = ("bytes",)
    controls: ClassVar[tuple[str, ...]] = ("none",)

    @abstractmethod
    def widths(self, slots: Slots, budget: Tensor) -> Tensor:
        """[T, k, N] float32: the bits of each slot, 0 where it is dropped, SOURCE at full budget."""

    @classmethod
    @abstractmethod
    def spent(cls, parts: LayerParts, bits: SlotBits, sizes: dict[float, float]) -> Tensor:
        """[POSITIONS] (float64): bytes that a slot takes in the mean at evenly spaced positions of the dial, on the calibration text.

        sizes: of a block at every width, 0 for a dropped one.
        """

    @classmethod
    @abstractmethod
    def least(cls, parts: LayerParts, bits: SlotBits) -> float:
        """The bits that a token's best slot has at least."""

    def keep(self, slots: Slots, budget: Tensor) -> Tensor:
        return self.widths(slots, budget) > 0


def share_above(cutoffs: Tensor, shares: Tensor, values: Tensor) -> Tensor:
    """The share of a layer's slots whose value reaches each of `values`, between the known ones in proportion to the value."""
    rising, above = cutoffs.flip(0), shares.flip(0)
    place = torch.searchsorted(rising, values.contiguous()).clamp(1, len(rising) - 1)
    low, high = rising[place - 1], rising[place]
    part = ((values - low) / (high - low).clamp(min=1e-30)).clamp(0, 1)
    return torch.lerp(above[place - 1], above[place], part)
