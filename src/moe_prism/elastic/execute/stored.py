"""Whole experts of a point whose weights are stored in few bits, multiplied as they lie: for few rows, where memory bounds a layer.

The weights are written out in the model's own type as well, for everything else.
Shapes: T tokens, k experts per token, E experts, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compress.codec import Codec
from ...compress.codec.nested import Nested
from ...compress.codec.rtn import Rtn
from ...compress.quantize.decoded import ExpertPart, Part
from ...model import MoELayer
from ...model.base import is_expert
from ..other_weights import OtherWeights
from ..planes import PackedPlanes

FEW_ROWS = 8
"""Tokens up to which this is known to take less time than weights of 16 bits (docs/explanation/blocks-and-bits.md)."""


@dataclass(frozen=True, eq=False)
class OfWidth:
    """The experts of one width. place [E]: their number among these, -1 for others."""

    layer: MoELayer
    place: Tensor
    packed: Sequence[PackedPlanes]
    bits: int


class StoredExperts:
    """A layer's experts, by width."""

    def __init__(self, widths: Sequence[OfWidth]) -> None:
        self.widths = widths

    @classmethod
    def of(cls, layer: MoELayer, codec: Codec, parts: Sequence[Part]) -> StoredExperts | None:
        """From what a change of weights encoded; None for what compiled products do not read."""
        if not isinstance(codec, Rtn | Nested) or layer.up_bias is not None or layer.down_bias is not None:
            return None
        found: list[OfWidth] = []
        if sum(len(part.experts) for part in parts if isinstance(part, ExpertPart)) != layer.num_experts:
            return None  # some stay as they are, or are stored in another way
        for part in parts:
            assert isinstance(part, ExpertPart)
            if not part.planes:
                continue  # not stored: they put out nothing
            packed = [PackedPlanes.of(codec, planes) for planes in part.planes]
            if any(own is None for own in packed):
                return None
            place = torch.full((layer.num_experts,), -1)
            place[part.experts] = torch.arange(len(part.experts))
            view = OtherWeights(layer, layer.gate, layer.up, layer.down)
            view.num_experts = len(part.experts)
            bits = int(part.planes[0].widths[-1])
            found.append(OfWidth(view, place, [own for own in packed if own is not None], bits))
        return cls(found)

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor | None:
        """[T, d] of rows x [T, d] (float32); None where this processor cannot."""
        from .from_planes import from_planes  # compiles on first use

        out, experts = torch.zeros_like(x), len(self.widths[0].place) if self.widths else 0
        for own in self.widths:
            mine = torch.where(is_expert(index, experts), own.place[index.clamp(0, experts - 1).long()], -1)
            part = from_planes(own.layer, own.packed, own.bits, (x, mine, weight, (mine >= 0)[:, :, None]))
            if part is None:
                return None
            out += part
        return out
