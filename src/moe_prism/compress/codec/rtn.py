"""Whole numbers: w = (code - zero) * scale, rounded to nearest, the scale of each group searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checkpoint.formats.bits import pack_dense, unpack_dense
from ...checkpoint.formats.grids import Integers, rounding
from ...checkpoint.formats.matrix import CodedMatrix
from ...checkpoint.formats.requantize import quantize
from .base import Plane, Planes
from .grouped import GroupCodec, Numbers, halves


@dataclass(frozen=True)
class Rtn(GroupCodec):
    """Round to nearest. symmetric: the zero is half of the range and takes no bytes; else each group has one, as wide as a code.

    One bit has no middle, so its zero lies between both codes: the sign times one size. Only symmetric.

    As compressed-tensors stores it: scales in bfloat16, codes packed along the inputs.
    """

    symmetric: bool = True
    name: ClassVar[str] = "rtn"
    widths: ClassVar[tuple[float, ...]] = (1, 2, 3, 4, 5, 6, 7, 8)

    @property
    def legal(self) -> tuple[float, ...]:
        return self.widths if self.symmetric else self.widths[1:]

    @classmethod
    def example(cls) -> Sequence[Rtn]:
        return [cls(), cls(symmetric=False)]

    def fit(self, values: Tensor, bits: float) -> Numbers:
        rows = values.reshape(-1, values.shape[-1])
        found = quantize(rows, self._form(len(rows), values.shape[-1], bits))
        assert found.zeros is not None
        shape = values.shape[:-1]
        return {"scale": found.scales.reshape(shape)} | ({} if self.symmetric else {"zero": found.zeros.reshape(shape)})

    def code(self, values: Tensor, numbers: Numbers, bits: float) -> Tensor:
        grid = Integers(0, 2 ** int(bits) - 1)
        return grid.encode(values / numbers["scale"][..., None] + self._zero(numbers, bits))

    def value(self, codes: Tensor, numbers: Numbers, bits: float) -> Tensor:
        return (codes.float() - self._zero(numbers, bits)) * numbers["scale"][..., None]

    def packed(self, codes: Tensor, numbers: Numbers, bits: float, group: int) -> Planes:
        tensors = {"codes": pack_dense(codes, int(bits)), **halves({"scale": numbers["scale"]})}
        if not self.symmetric:
            tensors["zero"] = pack_dense(numbers["zero"].to(torch.uint8), int(bits))
        return Planes(tuple(codes.shape), group, [Plane(bits, tensors)])

    def unpacked(self, planes: Planes, bits: float) -> tuple[Tensor, Numbers]:
        tensors = planes.upto(bits)[0].tensors
        numbers = {"scale": tensors["scale"].float()}
        if not self.symmetric:
            numbers["zero"] = unpack_dense(tensors["zero"], int(bits), numbers["scale"].shape[-1]).float()
        return unpack_dense(tensors["codes"], int(bits), planes.shape[-1]), numbers

    def bytes(self, shape: Sequence[int], bits: float, group: int) -> int:
        *outer, inputs = shape
        groups, width = -(-inputs // group), int(bits)
        zeros = 0 if self.symmetric else -(-groups * width // 8)
        return int(torch.Size(outer).numel()) * (-(-inputs * width // 8) + 2 * groups + zeros)

    def _zero(self, numbers: Numbers, bits: float) -> Tensor | float:
        return _middle(bits) if self.symmetric else numbers["zero"][..., None]

    def _form(self, rows: int, columns: int, bits: float) -> CodedMatrix:
        """What `quantize` fills in: one group per row."""
        top = 2 ** int(bits) - 1
        zeros = torch.full((rows, 1), _middle(bits))
        none = torch.zeros(0)
        zero_range = None if self.symmetric else (0, top)
        return CodedMatrix(none, Integers(0, top), none, (1, columns), rounding(torch.bfloat16), zeros, zero_range)


def _middle(bits: float) -> float:
    """The zero of a symmetric width."""
    return 0.5 if bits == 1 else 2.0 ** (bits - 1)
