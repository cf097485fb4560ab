"""A layer's experts in nested planes, block by block: what a slot costs at each width, and its weights at that width.

Rows are neurons: a group of weights that share a scale lies within one row of gate or up, or one column of down. So a block's planes are
its own, and the width of one slot says nothing about another's. Shapes: E experts, f neurons, d hidden, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..compress.codec import Planes
from ..compress.codec.nested import Nested
from ..model import MoELayer
from ..point import SlotBits
from .base import LayerParts
from .other_weights import OtherWeights

SOURCE = 16.0
"""Bits of a slot that is read as the model has it."""


def codec_of(widths: tuple[float, ...]) -> Nested:
    """The encoding that holds them all."""
    return Nested(base=int(widths[0]))


def row_bytes(hidden: int, bits: float, group: int) -> int:
    """Of one row of a matrix."""
    return 2 * hidden if bits == SOURCE else Nested().bytes((hidden,), bits, group)


def block_bytes(parts: LayerParts, bits: float, group: int) -> float:
    """Of the matrices of one block."""
    matrices = 3 if parts.layer.gate is not None else 2
    return float(parts.block * matrices * row_bytes(parts.layer.hidden, bits, group))


@dataclass
class CodedLayer:
    """The planes of a layer, and the layer at every width that was asked for: to measure and to compare with, not to save memory."""

    parts: LayerParts
    bits: SlotBits
    _at: dict[float, LayerParts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        codec, layer = codec_of(self.bits.widths), self.parts.layer
        rows = [None if w is None else w.detach() for w in (layer.gate, layer.up, layer.down.transpose(1, 2))]
        last = self.bits.widths[-1]
        self.planes: list[Planes | None] = [None if w is None else codec.encode(w, last, self.bits.group) for w in rows]

    def at(self, bits: float) -> LayerParts:
        """The parts with every expert at a width, biases aside."""
        if bits not in self._at:
            layer: MoELayer = self.parts.layer
            if bits != SOURCE:
                gate, up, down = (self._decoded(planes, bits) for planes in self.planes)
                assert up is not None and down is not None
                layer = OtherWeights(layer, gate, up, down.transpose(1, 2))
            else:
                layer = OtherWeights(layer, layer.gate, layer.up, layer.down)
            self._at[bits] = replace(self.parts, layer=layer)
        return self._at[bits]

    def run(self, execute: Callable[..., Tensor], x: Tensor, index: Tensor, weight: Tensor, widths: Tensor) -> Tensor:
        """The sum over slots, each at its own width. widths [T, k, N], 0 where a slot is dropped; else as `execute.reference`."""
        out = torch.zeros_like(x)
        for bits in torch.unique(widths).tolist():
            if bits:
                out = out + execute(self.at(bits), x, index, weight, widths == bits)
        bias = self.parts.layer.down_bias
        if bias is None:
            return out
        kept = weight * (widths > 0).any(2)
        return out + (bias[index.clamp(0, self.parts.layer.num_experts - 1)] * kept[:, :, None]).float().sum(1).to(out.dtype)

    def _decoded(self, planes: Planes | None, bits: float) -> Tensor | None:
        up = self.parts.layer.up
        return None if planes is None else codec_of(self.bits.widths).decode(planes, bits).to(up.device, up.dtype).contiguous()
