"""A width for each chosen expert of a token, by the error that it would have at the least one (D2MoE, arXiv 2504.15299).

The error is predicted before the expert is read: log e = slope . x + offset + 2 log routing weight, slope and offset of the expert. A step
from a width to the next saves the layer's share of it for so many bytes more. The best use of some bytes takes every step that saves
enough per byte, so each step has a cutoff of its own in log e, at fixed distances, and the dial moves them all. Nothing is dropped.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import UsageError
from ...model import MoELayer
from ...point import SlotBits
from ...point.slots import BitRouter
from ..base import LayerParts, Slots
from ..coded import SOURCE, block_bytes
from ..side_tensors import POSITIONS
from .widths import WidthRule, share_above


class D2Moe(WidthRule):
    """The published bit router is a matrix before every expert, trained; this one is a row, fitted, and lies in the point."""

    paper = "arXiv 2504.15299"
    needs_norms = False
    maker: ClassVar[str] = "moe_prism.methods.slots.d2moe:D2MoeMethod"

    def __init__(self, parts: LayerParts, bits: SlotBits) -> None:
        super().__init__(parts)
        device, router = parts.layer.up.device, _router(bits)
        rows = read_rows(router.rows[parts.layer.index], parts.layer).to(device)
        self.slopes, self.offsets = rows[:, :-1], rows[:, -1]
        self.bits, self.steps = bits, steps(parts, bits, parts.layer.index)
        self.range = cutoff_range(parts, bits)

    def widths(self, slots: Slots, budget: Tensor) -> Tensor:
        found = self.predicted(slots.x, slots.index, slots.weight)
        high, low = self.range
        cutoff = (high + budget * (low - high))[:, None]
        widths = torch.full_like(found, self.bits.widths[0])
        for bits, distance in self.steps:
            widths = torch.where(found >= cutoff + distance, bits, widths)
        widths = torch.where((budget >= 1)[:, None], SOURCE, widths)  # the model itself
        return widths.masked_fill(~slots.valid, 0.0)[:, :, None].expand(-1, -1, slots.n_sub).contiguous()

    def predicted(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """[T, k] float32: the logarithm of a slot's error at the least width."""
        known = index.clamp(0, len(self.offsets) - 1)
        own = (x.float() @ self.slopes.T + self.offsets).gather(1, known.long())
        return own + 2 * weight.float().abs().clamp(min=1e-12).log()

    @classmethod
    def least(cls, parts: LayerParts, bits: SlotBits) -> float:
        return bits.widths[0]

    @classmethod
    def spent(cls, parts: LayerParts, bits: SlotBits, sizes: dict[float, float]) -> Tensor:
        levels = torch.tensor(_router(bits).levels[parts.layer.index], dtype=torch.float64)
        high, low = cutoff_range(parts, bits)
        cutoffs = torch.linspace(high, low, POSITIONS, dtype=torch.float64)
        shares = torch.linspace(0, 1, len(levels), dtype=torch.float64)
        before = sizes[bits.widths[0]]
        found = torch.full_like(cutoffs, before)
        for width, distance in steps(parts, bits, parts.layer.index):
            found += (sizes[width] - before) * share_above(levels, shares, cutoffs + distance)
            before = sizes[width]
        return found


def steps(parts: LayerParts, bits: SlotBits, layer: int) -> list[tuple[float, float]]:
    """(bits, distance of its cutoff) of the widths worth having above the least, rising: the lower convex hull of error and bytes."""
    found: list[tuple[float, float, float, float]] = [
        (bits.widths[0], block_bytes(parts, bits.widths[0], bits.group), bits.errors[layer][0], float("inf"))
    ]
    for width, error in zip(bits.widths[1:], bits.errors[layer][1:], strict=True):
        size = block_bytes(parts, width, bits.group)
        while True:
            _, before, lost, slope = found[-1]
            gain = (lost - error) / (size - before)
            if gain <= slope or len(found) == 1:
                break
            found.pop()
        if gain > 0:
            found.append((width, size, error, gain))
    whole = block_bytes(parts, SOURCE, bits.group)
    return [(width, -torch.tensor(gain * whole).log().item()) for width, _, _, gain in found[1:]]


def cutoff_range(parts: LayerParts, bits: SlotBits) -> tuple[float, float]:
    """Cutoffs of the dial's ends, the same in all layers: at the first every slot has the least width, at the last the largest."""
    levels = _router(bits).levels
    every = [(row, [distance for _, distance in steps(parts, bits, layer)]) for layer, row in enumerate(levels)]
    high = max(row[0] - min(own, default=0.0) for row, own in every)
    return high + 1e-3, min(row[-1] - max(own, default=0.0) for row, own in every) - 1e-3


def written_rows(rows: Tensor) -> str:
    """[E, d + 1] as a point has them."""
    return b64encode(rows.half().cpu().numpy().astype("<f2").tobytes()).decode()


def read_rows(text: str, layer: MoELayer) -> Tensor:
    """The reverse, float32. UsageError for what are no finite rows of this layer's shape."""
    try:
        data = b64decode(text, validate=True)
    except ValueError:
        data = b""
    if len(data) != 2 * layer.num_experts * (layer.hidden + 1):
        raise UsageError("the bit router of the slots is of layers of another shape", "make a point for this model")
    rows = torch.from_numpy(np.frombuffer(data, "<f2").astype(np.float32)).view(layer.num_experts, layer.hidden + 1)
    if not bool(torch.isfinite(rows).all()):
        raise UsageError("the bit router of the slots holds numbers that are not finite", "make a point for this model")
    return rows


def _router(bits: SlotBits) -> BitRouter:
    assert bits.router is not None  # the point says so
    return bits.router
