"""Repaired down-projections: the blocks that are kept make up for the ones that are dropped.

Where j of an expert's N blocks are dropped for a token, what is kept is projected by W_down + D_b instead of W_down, b the band of j and
D_b fitted at recovery (`moe_prism.recover.repair`). An expert whose blocks are all kept uses its own W_down: full budget is untouched,
and so is every whole expert at any budget. A kept slot reads as many weights as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .base import LayerParts
from .other_weights import OtherWeights
from .side_tensors import REPAIR


def band_of(dropped: Tensor, bands: int, n_sub: int) -> Tensor:
    """The band of 1..N-1 dropped blocks, 0..bands-1 (equal ranges, few dropped first); -1 where none or all of them are."""
    band = torch.div((dropped - 1) * bands, n_sub - 1, rounding_mode="floor")
    return band.masked_fill((dropped < 1) | (dropped >= n_sub), -1)


class Repaired:
    """Runs an executor so that every chosen expert is projected as its number of dropped blocks asks for."""

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts
        self.bands = len(parts.tensors[REPAIR])
        self._repaired: dict[int, LayerParts] = {}

    def __call__(self, execute: Callable[..., Tensor], x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
        """Shapes as in `execute.reference`."""
        band = band_of(self.parts.n_sub - keep.sum(2), self.bands, self.parts.n_sub)[:, :, None]
        out = execute(self.parts, x, index, weight, keep & (band < 0))
        for b in range(self.bands):
            mine = band == b
            if mine.any():
                out = out + execute(self._with(b), x, index, weight, keep & mine)
        return out

    def _with(self, band: int) -> LayerParts:
        """The parts with W_down + D_b, stored neuron by neuron so that a block is one piece of memory; made on first use."""
        if band not in self._repaired:
            layer = self.parts.layer
            delta = self.parts.tensors[REPAIR][band].to(layer.down.device)
            down = (layer.down.float() + delta.float()).to(layer.down.dtype).transpose(1, 2).contiguous().transpose(1, 2)
            self._repaired[band] = replace(self.parts, layer=OtherWeights(layer, layer.gate, layer.up, down, bias=True))
        return self._repaired[band]
