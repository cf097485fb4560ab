"""One size per group: signs alone, or signs and zeros. The low end of what weights bear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checkpoint.formats.bits import pack_dense, unpack_dense
from .base import Plane, Planes
from .grouped import GroupCodec, Numbers, halves, stored

TRITS = 5  # of a byte: 3^5 = 243


class _OneSize(GroupCodec):
    """The mean size of a group's weights is that of every code but 0."""

    def fit(self, values: Tensor, bits: float) -> Numbers:
        return {"size": stored(values.abs().mean(-1))}

    def packed(self, codes: Tensor, numbers: Numbers, bits: float, group: int) -> Planes:
        return Planes(tuple(codes.shape), group, [Plane(bits, {"codes": self.pack(codes), **halves(numbers)})])

    def unpacked(self, planes: Planes, bits: float) -> tuple[Tensor, Numbers]:
        tensors = planes.upto(bits)[0].tensors
        return self.unpack(tensors["codes"], planes.shape[-1]), {"size": tensors["size"].float()}

    def bytes(self, shape: Sequence[int], bits: float, group: int) -> int:
        *outer, inputs = shape
        return int(torch.Size(outer).numel()) * (
            self.pack(torch.zeros(inputs, dtype=torch.uint8)).numel() + 2 * -(-inputs // group)
        )

    @staticmethod
    def pack(codes: Tensor) -> Tensor:
        """Codes [..., i] as bytes [..., b]."""
        raise NotImplementedError

    @staticmethod
    def unpack(octets: Tensor, inputs: int) -> Tensor:
        """The reverse."""
        raise NotImplementedError


@dataclass(frozen=True)
class Binary(_OneSize):
    """sign(w) times the mean |w| of the group."""

    name: ClassVar[str] = "binary"
    widths: ClassVar[tuple[float, ...]] = (1,)

    def code(self, values: Tensor, numbers: Numbers, bits: float) -> Tensor:
        return (values >= 0).to(torch.uint8)

    def value(self, codes: Tensor, numbers: Numbers, bits: float) -> Tensor:
        return (codes.float() * 2 - 1) * numbers["size"][..., None]

    @staticmethod
    def pack(codes: Tensor) -> Tensor:
        """Eight to a byte."""
        return pack_dense(codes, 1)

    @staticmethod
    def unpack(octets: Tensor, inputs: int) -> Tensor:
        """The reverse."""
        return unpack_dense(octets, 1, inputs)


@dataclass(frozen=True)
class Ternary(_OneSize):
    """-1, 0 or 1 times the mean |w| of the group's weights that are not 0, whichever is nearest: weights that are so stay as they are."""

    name: ClassVar[str] = "ternary"
    paper: ClassVar[str] = "arXiv 2506.14435"
    widths: ClassVar[tuple[float, ...]] = (1.6,)

    def fit(self, values: Tensor, bits: float) -> Numbers:
        return {"size": stored(values.abs().sum(-1) / values.count_nonzero(-1).clamp_min(1))}

    def code(self, values: Tensor, numbers: Numbers, bits: float) -> Tensor:
        return ((values / numbers["size"].clamp_min(1e-30)[..., None]).round().clamp(-1, 1) + 1).to(torch.uint8)

    def value(self, codes: Tensor, numbers: Numbers, bits: float) -> Tensor:
        return (codes.float() - 1) * numbers["size"][..., None]

    @staticmethod
    def pack(codes: Tensor) -> Tensor:
        """Five to a byte."""
        trits = torch.unflatten(torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TRITS)), -1, (-1, TRITS))
        packed: Tensor = (trits * _powers(codes)).sum(-1)
        return packed.to(torch.uint8)

    @staticmethod
    def unpack(octets: Tensor, inputs: int) -> Tensor:
        """The reverse."""
        trits = octets[..., None].int() // _powers(octets) % 3
        return trits.to(torch.uint8).flatten(-2)[..., :inputs]


def _powers(like: Tensor) -> Tensor:
    return 3 ** torch.arange(TRITS, dtype=torch.int32, device=like.device)
