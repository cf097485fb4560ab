"""Small floats as released checkpoints have them: FP8 in blocks, MXFP4 in groups. The arithmetic is that of `checkpoint.formats`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checkpoint.formats.bits import pack_octets, unpack_octets
from ...checkpoint.formats.grids import Float4, Float8, rounding, scale_values, stored_scales
from ...checkpoint.formats.matrix import CodedMatrix
from ...checkpoint.formats.requantize import quantize
from .base import Codec, Plane, Planes
from .grouped import GroupCodec, Numbers

_NONE = torch.zeros(0)


@dataclass(frozen=True)
class MicroFloat4(GroupCodec):
    """OCP Microscaling FP4 (E2M1), one power of two for 32 weights."""

    name: ClassVar[str] = "mxfp4"
    paper: ClassVar[str] = "OCP Microscaling Formats 1.0"
    widths: ClassVar[tuple[float, ...]] = (4,)
    groups: ClassVar[tuple[int, ...]] = (32,)

    def fit(self, values: Tensor, bits: float) -> Numbers:
        rows = values.reshape(-1, values.shape[-1])
        form = CodedMatrix(_NONE, Float4(), _NONE, (1, values.shape[-1]), rounding(torch.float8_e8m0fnu))
        return {"scale": quantize(rows, form).scales.reshape(values.shape[:-1])}

    def code(self, values: Tensor, numbers: Numbers, bits: float) -> Tensor:
        return Float4().encode(values / numbers["scale"][..., None])

    def value(self, codes: Tensor, numbers: Numbers, bits: float) -> Tensor:
        return Float4().decode(codes) * numbers["scale"][..., None]

    def packed(self, codes: Tensor, numbers: Numbers, bits: float, group: int) -> Planes:
        scale = stored_scales(numbers["scale"], torch.empty(numbers["scale"].shape, dtype=torch.uint8, device="meta"))
        even = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
        return Planes(tuple(codes.shape), group, [Plane(bits, {"codes": pack_octets(even, 4), "scale": scale})])

    def unpacked(self, planes: Planes, bits: float) -> tuple[Tensor, Numbers]:
        tensors = planes.upto(bits)[0].tensors
        return unpack_octets(tensors["codes"], 4)[..., : planes.shape[-1]], {"scale": scale_values(tensors["scale"])}

    def bytes(self, shape: Sequence[int], bits: float, group: int) -> int:
        *outer, inputs = shape
        return int(torch.Size(outer).numel()) * (-(-inputs // 2) + -(-inputs // group))


@dataclass(frozen=True)
class Fp8Block(Codec):
    """E4M3 with one float32 scale for 128 x 128 weights (DeepSeek-V3's form)."""

    name: ClassVar[str] = "fp8-block"
    paper: ClassVar[str] = "arXiv 2412.19437"
    widths: ClassVar[tuple[float, ...]] = (8,)
    groups: ClassVar[tuple[int, ...]] = (128,)

    def encode(self, matrix: Tensor, bits: float, group: int, gram: Tensor | None = None) -> Planes:
        self.checked(matrix, bits, group, gram)
        form = self._form(_NONE, _NONE, group)
        outer = matrix.shape[:-2]
        found = [quantize(each.float(), form) for each in matrix.reshape(-1, *matrix.shape[-2:])]
        tensors = {
            "codes": torch.stack([each.codes for each in found]).reshape(matrix.shape),
            "scale": torch.stack([each.scales for each in found]).reshape(*outer, *found[0].scales.shape),
        }
        return Planes(tuple(matrix.shape), group, [Plane(bits, tensors)])

    def decode(self, planes: Planes, bits: float) -> Tensor:
        tensors = planes.upto(bits)[0].tensors
        return self._form(tensors["codes"], tensors["scale"], planes.group).values()

    def bytes(self, shape: Sequence[int], bits: float, group: int) -> int:
        *outer, outputs, inputs = shape
        return int(torch.Size(outer).numel()) * (outputs * inputs + 4 * -(-outputs // group) * -(-inputs // group))

    @staticmethod
    def _form(codes: Tensor, scales: Tensor, group: int) -> CodedMatrix:
        return CodedMatrix(codes, Float8(torch.float8_e4m3fn), scales, (group, group), rounding(torch.float32))
