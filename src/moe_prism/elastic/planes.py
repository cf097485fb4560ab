"""A layer's matrices in planes of four bits, block by block, as compiled products read them (`kernels/plane_tiles.py` says how).

Nothing is written out: planes of 8 bits take half of the memory that bfloat16 does, and a slot that is read at 4 bits or fewer touches
half of that. `decoded` is the reference to read. Shapes: E experts, N blocks, o outputs and i inputs of a block, G = i / g groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..compress.codec import Planes
from ..compress.codec.nested import Nested
from ..compress.codec.rtn import Rtn

OUTPUTS = 16  # that lie side by side
QUAD = 4  # inputs of an output that do
UPPER = 4  # bits of the first plane


class PlanePlaces(NamedTuple):
    """Where planes lie. upper [G] int64: the address of the first tile of every block; lower [G]: bytes from a tile to its lower plane."""

    upper: Tensor
    lower: Tensor


class PlacedPlanes(Protocol):
    """What compiled products want to know of a matrix: inputs of an output, inputs that share a scale, and where its planes lie."""

    @property
    def inputs(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def places(self) -> PlanePlaces: ...

    def offset(self, bits: int) -> float: ...

    def form(self, bits: int) -> list[int]: ...


@dataclass(frozen=True, eq=False)
class PackedPlanes:
    """tiles uint8 [E, N, o / 16, scales | upper plane | lower plane]. bits: that are stored, above four with a lower plane.

    centred: codes are of cells, and a weight is the middle of its cell.
    """

    tiles: Tensor
    inputs: int
    group: int
    bits: int
    centred: bool

    @classmethod
    def encoded(cls, codec: Nested | Rtn, matrix: Tensor, bits: float, group: int) -> PackedPlanes | None:
        """A matrix [E, N, o, i] stored by a codec; None for what the products do not read."""
        if not _is_plain(codec) or matrix.shape[-1] % group or matrix.shape[-2] % OUTPUTS:
            return None
        tiles = [_tiles(codec, codec.encode(own, bits, group)) for own in matrix]  # the search takes many times a matrix's memory
        return cls(torch.stack(tiles), matrix.shape[-1], group, int(bits), isinstance(codec, Nested))

    @classmethod
    def of(cls, codec: Nested | Rtn, planes: Planes) -> PackedPlanes | None:
        """Stored matrices [E, o, i] as those of one block; None for what the products do not read."""
        _, outputs, inputs = planes.shape
        if not _is_plain(codec) or inputs % planes.group or outputs % OUTPUTS:
            return None
        bits = int(planes.widths[-1])
        return cls(_tiles(codec, planes)[:, None].contiguous(), inputs, planes.group, bits, isinstance(codec, Nested))

    @property
    def plane(self) -> int:
        """Bytes of a plane of a tile."""
        return self.inputs * OUTPUTS // 2

    @property
    def scales(self) -> int:
        """Bytes of a tile's scales."""
        return 2 * OUTPUTS * self.inputs // self.group

    def offset(self, bits: int) -> float:
        """What is added to a code of which `bits` are read, in steps of the upper plane."""
        return offset_of(bits, self.centred)

    @cached_property
    def places(self) -> PlanePlaces:
        """Of all blocks of the layer [E N], in order."""
        blocks, size = self.tiles.shape[0] * self.tiles.shape[1], self.tiles[0, 0].numel()
        upper = self.tiles.data_ptr() + size * torch.arange(blocks)
        return PlanePlaces(upper, torch.full((blocks,), self.scales + self.plane))

    def form(self, bits: int) -> list[int]:
        """What the jobs want to know: bytes of a tile, groups, lines of a group, mask, whether the lower plane is read."""
        return [self.tiles.shape[-1], self.inputs // self.group, self.group // (2 * QUAD), *read_of(bits)]

    def constants(self, bits: int) -> dict[str, int | float | bool]:
        """The same for Triton's kernels."""
        both = bits > UPPER
        mask = 256 - (1 << (8 - bits)) if both else 16 - (1 << (UPPER - bits))
        unit = 1 / 16 if both else 1.0
        known = {"GROUP": self.group, "BYTES": self.tiles.shape[-1], "MASK": mask}
        return {**known, "BOTH": both, "UNIT": unit, "OFFSET": self.offset(bits)}

    def of_expert(self, expert: int) -> PackedPlanes:
        """Of one expert."""
        return replace(self, tiles=self.tiles[expert : expert + 1])

    def decoded(self, bits: int) -> Tensor:
        """float32 [E, N, o, i] at a width."""
        scale = self.tiles[..., : self.scales].contiguous().view(torch.bfloat16).float()
        scale = torch.unflatten(scale, -1, (-1, OUTPUTS)).transpose(-1, -2).flatten(-3, -2)  # [E, N, o, G]
        planes = torch.split(self.tiles[..., self.scales :], self.plane, -1)
        codes = 16 * _unpacked(planes[0]) + (_unpacked(planes[1]) if bits > UPPER else 0)
        steps = (codes & (256 - (1 << (8 - bits)))).float() / 16 + self.offset(bits)
        return (torch.unflatten(steps, -1, (-1, self.group)) * scale[..., None]).flatten(-2)


def offset_of(bits: int, centred: bool) -> float:
    """`PackedPlanes.offset`."""
    if centred:
        return 2.0 ** (UPPER - 1 - bits) - 2.0 ** (UPPER - 1)
    return -(2.0 ** (UPPER - 1)) if bits > 1 else -(2.0 ** (UPPER - 2))


def read_of(bits: int) -> tuple[int, int]:
    """(mask: which bits count in every four of the last plane that is read, whether the lower plane is read) at a width."""
    both = bits > UPPER
    return 0x01010101 * ((0xF << ((8 if both else UPPER) - bits)) & 0xF), int(both)


def _is_plain(codec: Nested | Rtn) -> bool:
    return codec.symmetric and not getattr(codec, "own_sizes", False)


def _tiles(codec: Nested | Rtn, planes: Planes) -> Tensor:
    """[..., o / 16, bytes] of a stored matrix [..., o, i]."""
    bits = int(planes.widths[-1])
    codes, numbers = codec.unpacked(planes, bits)
    scale = (
        numbers["cell"] * 2.0 ** (codec.base - UPPER) if isinstance(codec, Nested) else numbers["scale"] * 2.0 ** (bits - UPPER)
    )
    scale = torch.unflatten(scale, -2, (-1, OUTPUTS)).transpose(-1, -2).flatten(-2).bfloat16()
    codes = codes << (8 - bits)
    parts = [scale.contiguous().view(torch.uint8), _packed(codes >> UPPER)]
    return torch.cat([*parts, _packed(codes & 15)] if bits > UPPER else parts, -1)


def _packed(codes: Tensor) -> Tensor:
    """Codes of four bits [..., o, i] -> [..., o / 16, lines of 64 bytes]."""
    cut = torch.unflatten(torch.unflatten(codes, -1, (-1, 2, QUAD)), -4, (-1, OUTPUTS))  # [..., o / 16, 16, i / 8, 2, 4]
    first, second = cut.transpose(-4, -3).unbind(-2)
    return (first | second << UPPER).flatten(-3)


def _unpacked(lines: Tensor) -> Tensor:
    """The reverse, int32."""
    octets = torch.unflatten(lines.int(), -1, (-1, OUTPUTS, QUAD))
    both = torch.stack([octets & 15, octets >> UPPER], -2)  # [..., o / 16, i / 8, 16, 2, 4]
    return both.transpose(-4, -3).flatten(-3).flatten(-3, -2)
