"""Whole numbers of 8 bits with one scale per row: what a record of the store is widened from in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, Plane, Planes

LEVELS = 127  # of a weight, either sign
WHOLE_ROW = 0


@dataclass(frozen=True)
class Int8Rows(Codec):
    """Every row in steps of its largest weight / 127, the step in float32. Nothing is searched, so that a file is packed quickly."""

    name: ClassVar[str] = "int8-rows"
    widths: ClassVar[tuple[float, ...]] = (8,)
    groups: ClassVar[tuple[int, ...]] = (WHOLE_ROW,)

    def encode(self, matrix: Tensor, bits: float = 8, group: int = WHOLE_ROW, gram: Tensor | None = None) -> Planes:
        self.checked(matrix, bits, group, gram)
        scale = matrix.float().abs().amax(-1) / LEVELS
        codes = (matrix.float() / scale.clamp(min=1e-30)[..., None]).round().to(torch.int8)
        return Planes(tuple(matrix.shape), group, [Plane(bits, {"scale": scale, "codes": codes})])

    def decode(self, planes: Planes, bits: float = 8) -> Tensor:
        tensors = planes.upto(bits)[0].tensors
        return tensors["codes"].float() * tensors["scale"][..., None]

    def bytes(self, shape: Sequence[int], bits: float, group: int) -> int:
        return int(torch.Size(shape).numel()) + 4 * int(torch.Size(shape[:-1]).numel())
