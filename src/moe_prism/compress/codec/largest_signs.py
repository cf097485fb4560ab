"""What fine-tuning changed, as the signs of its largest entries and one size: ComPEFT (arXiv 2311.13171).

Made for differences of weights, not for weights: most of a difference hardly counts, and how large the rest is counts less than where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, Plane, Planes
from .signs import Ternary


@dataclass(frozen=True)
class LargestSigns(Codec):
    """The `keep` largest of a matrix [o, i] as -1 or 1 times one size, five to a byte; the others are 0. Groups do not matter.

    size: of the kept ones in terms of the standard deviation of all, alpha in the paper, which is searched there; 0: their mean, which
    has the least squared error.
    """

    keep: float = 0.2
    size: float = 0.0
    name: ClassVar[str] = "compeft"
    paper: ClassVar[str] = "arXiv 2311.13171"
    widths: ClassVar[tuple[float, ...]] = (1.6,)

    @classmethod
    def example(cls) -> Sequence[LargestSigns]:
        return [cls(), cls(keep=0.05)]

    def encode(self, matrix: Tensor, bits: float, group: int, gram: Tensor | None = None) -> Planes:
        self.checked(matrix, bits, group, gram)
        flat = matrix.float().flatten(-2)
        largest = flat.abs().topk(max(1, round(self.keep * flat.shape[-1])), -1).indices
        kept = flat.gather(-1, largest)
        size = self.size * flat.std(-1, unbiased=False) if self.size else kept.abs().mean(-1)
        codes = torch.ones_like(flat).scatter(-1, largest, 1 + kept.sign()).view(matrix.shape).to(torch.uint8)
        return Planes(tuple(matrix.shape), group, [Plane(bits, {"codes": Ternary.pack(codes), "size": size})])

    def decode(self, planes: Planes, bits: float) -> Tensor:
        tensors = planes.upto(bits)[0].tensors
        codes = Ternary.unpack(tensors["codes"], planes.shape[-1])
        return (codes.float() - 1) * tensors["size"][..., None, None]

    def bytes(self, shape: Sequence[int], bits: float, group: int) -> int:
        *outer, outputs, inputs = shape
        row = Ternary.pack(torch.zeros(inputs, dtype=torch.uint8)).numel()
        return int(torch.Size(outer).numel()) * (outputs * row + 4)
