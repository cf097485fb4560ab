"""A layer's experts in nested planes, block by block: what a slot costs at each width, and its weights at that width.

A block's planes are its own, and the width of one slot says nothing about another's: a group of weights that share a scale lies within one
row of gate or up and, of down, among the inputs of one block. Where blocks are no whole groups it lies along a column of down.
Shapes: E experts, f neurons, d hidden, N blocks of m neurons.
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
from .planes import PackedPlanes

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
    return float(parts.stored_block * matrices * row_bytes(parts.layer.hidden, bits, group))


@dataclass
class CodedLayer:
    """The planes of a layer: multiplied as they lie where they can be, and written out at every width that somebody else asks for."""

    parts: LayerParts
    bits: SlotBits
    _at: dict[float, LayerParts] = field(default_factory=dict)
    _choosing: dict[float, LayerParts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._codec, layer = codec_of(self.bits.widths), self.parts.layer
        last, group = self.bits.widths[-1], self.bits.group
        first = [w.detach() for w in (layer.gate, layer.up) if w is not None]
        down = layer.down.detach()
        self.packed: list[PackedPlanes] = []
        """Of gate, where there is one, up and down; none where compiled products do not take them."""
        if layer.up_bias is None and not self.parts.block % group:
            blocks = [torch.unflatten(w, 1, (self.parts.n_sub, -1)) for w in first]
            blocks.append(torch.unflatten(down, 2, (self.parts.n_sub, -1)).transpose(1, 2))
            found = [PackedPlanes.encoded(self._codec, w, last, group) for w in blocks]
            self.packed = [planes for planes in found if planes is not None]
        rows = [] if self.packed else [*first, down.transpose(1, 2)]
        self.planes: list[Planes] = [self._codec.encode(w, last, group) for w in rows]

    def at(self, bits: float) -> LayerParts:
        """The parts with every expert written out at a width, biases aside: to measure, and to compare with."""
        if bits not in self._at:
            layer: MoELayer = self.parts.layer
            if bits != SOURCE:
                *gate, up, down = self._written_out(bits)
                layer = OtherWeights(layer, gate[0] if gate else None, up, down)
            else:
                layer = OtherWeights(layer, layer.gate, layer.up, layer.down)
            self._at[bits] = replace(self.parts, layer=layer)
        return self._at[bits]

    def choosing(self, bits: float) -> LayerParts:
        """Parts of the gate neurons alone, which a block begins with: what slots are chosen by, without the other weights."""
        if bits == SOURCE or not self.packed or not self.parts.gates:
            return self.at(bits)
        if bits not in self._choosing:
            gates, ids = self.parts.gates, self.parts.gate_ids().flatten()
            every = [self._of_expert(e, bits) for e in range(self.parts.layer.num_experts)]
            *gate, up, down = (torch.cat([w[:, ids] for w in own]) for own in zip(*every, strict=True))
            layer = OtherWeights(self.parts.layer, gate[0] if gate else None, up, down.transpose(1, 2))
            self._choosing[bits] = LayerParts(layer, self.parts.n_sub, gates, self.parts.tensors)
        return self._choosing[bits]

    def run(self, execute: Callable[..., Tensor], x: Tensor, index: Tensor, weight: Tensor, widths: Tensor) -> Tensor:
        """The sum over slots, each at its own width. widths [T, k, N], 0 where a slot is dropped; else as `execute.reference`.

        execute: (this, bits, x, index, weight, slots [T, k, N]) -> [T, d], what slots at one width add.
        """
        out = torch.zeros_like(x)
        for bits in torch.unique(widths).tolist():
            if bits:
                out = out + execute(self, bits, x, index, weight, widths == bits)
        bias = self.parts.layer.down_bias
        if bias is None:
            return out
        kept = weight * (widths > 0).any(2)
        return out + (bias[index.clamp(0, self.parts.layer.num_experts - 1)] * kept[:, :, None]).float().sum(1).to(out.dtype)

    def _written_out(self, bits: float) -> list[Tensor]:
        """gate, where there is one, up [E, f, d] and down [E, d, f] at a width, in the type of the layer's own."""
        up = self.parts.layer.up
        if self.packed:
            every = [self._of_expert(e, bits) for e in range(self.parts.layer.num_experts)]
            *first, rows = (torch.cat(own) for own in zip(*every, strict=True))
        else:
            *first, rows = (self._codec.decode(planes, bits).to(up.device, up.dtype).contiguous() for planes in self.planes)
        return [*first, rows.transpose(1, 2)]

    def _of_expert(self, expert: int, bits: float) -> list[Tensor]:
        """gate, where there is one, up and down of one expert [1, f, d], a row per neuron."""
        *first, down = (planes.of_expert(expert).decoded(int(bits)).to(self.parts.layer.up.dtype) for planes in self.packed)
        return [*(w.flatten(1, 2) for w in first), down.transpose(2, 3).flatten(1, 2)]
