"""Records of nested planes: two of every sub-expert, of which a slot in few bits reads the first alone.

A record is one plane of four bits of gate, up and down, in the tiles that compiled products read (`elastic/planes.py`). The upper one holds
the scales as well. The lower one has a gap in their place, so that a weight lies equally far into both.
Shapes: E experts, N sub-experts of m neurons, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..compress.codec.nested import Nested
from ..elastic.planes import OUTPUTS, UPPER, PackedPlanes
from ..errors import UsageError
from ..model import MoELayer
from .layout import DTYPES, padded

ADVICE = "give nested:bits=8:group=32, or leave --format records out"


class PlaneStorage(NamedTuple):
    """How experts are encoded: bits of the first plane of all, bits in all, and inputs that share a scale."""

    base: int = 2
    bits: int = 8
    group: int = 64


class PlaneMatrix(NamedTuple):
    """One matrix of a block within a record. at: its first byte; tile: bytes of a tile; scales: of them scales."""

    at: int
    tile: int
    scales: int


@dataclass(frozen=True)
class PlaneLayout:
    """Both records of a sub-expert have the same length, padding included."""

    hidden: int
    block: int
    has_gate: bool
    dtype: str
    base: int
    bits: int
    group: int
    planes: ClassVar[int] = 2
    """Records of a sub-expert."""
    has_bias: ClassVar[bool] = False
    rows: ClassVar[int] = 0  # there is no int8 form
    low_bytes: ClassVar[int] = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def weights(self) -> int:
        return (3 if self.has_gate else 2) * self.block * self.hidden

    @property
    def first(self) -> Sequence[PlaneMatrix]:
        """Gate, where there is one, and up."""
        size, scales = _tile(self.hidden, self.group)
        bytes_ = self.block // OUTPUTS * size
        return [PlaneMatrix(i * bytes_, size, scales) for i in range(2 if self.has_gate else 1)]

    @property
    def down(self) -> PlaneMatrix:
        before = self.first[-1]
        return PlaneMatrix(before.at + self.block // OUTPUTS * before.tile, *_tile(self.block, self.group))

    @cached_property
    def bytes(self) -> int:
        """Of a record, padding included."""
        return padded(self.down.at + self.hidden // OUTPUTS * self.down.tile)

    def records(self, layer: MoELayer, parts: int) -> Tensor:
        """All records of a layer, uint8 [E * parts, bytes]; parts: records of an expert, upper and lower ones in turn."""
        n_sub, codec = parts // self.planes, Nested(base=self.base)
        matrices = [torch.unflatten(w, 1, (n_sub, -1)) for w in (layer.gate, layer.up) if w is not None]
        matrices.append(torch.unflatten(layer.down, 2, (n_sub, -1)).transpose(1, 2))
        both: list[list[Tensor]] = [[], []]
        for matrix in matrices:
            packed = PackedPlanes.encoded(codec, matrix, self.bits, self.group)
            assert packed is not None  # `of` has asked
            upper, lower = torch.split(packed.tiles, [packed.scales + packed.plane, packed.plane], -1)
            both[0].append(upper.flatten(2))
            both[1].append(torch.nn.functional.pad(lower, (packed.scales, 0)).flatten(2))
        records = torch.stack([torch.cat(own, -1) for own in both], 2).flatten(0, 2)
        return torch.nn.functional.pad(records, (0, self.bytes - records.shape[1]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, layer: MoELayer, parts: int, storage: PlaneStorage) -> Self:
        """Of a layer's sub-experts, `parts` records per expert. UsageError for what has no planes."""
        block, group = layer.width // (parts // cls.planes), storage.group
        if not UPPER < storage.bits <= 2 * UPPER or storage.base > UPPER:
            raise UsageError(f"records hold two planes of {UPPER} bits, not {storage.bits} bits on {storage.base}", ADVICE)
        if layer.up_bias is not None:
            raise UsageError(f"experts of '{layer.name}' have biases inside, which planes do not hold", "leave --format out")
        if layer.hidden % group or block % group or block % OUTPUTS or layer.hidden % OUTPUTS:
            raise UsageError(f"blocks of {block} neurons and {layer.hidden} inputs are no whole groups of {group}", ADVICE)
        name = str(layer.up.dtype).removeprefix("torch.")
        return cls(layer.hidden, block, layer.gate is not None, name, *storage)


def _tile(inputs: int, group: int) -> tuple[int, int]:
    """(bytes of a tile of one plane, bytes of scales among them)."""
    scales = 2 * OUTPUTS * inputs // group
    return scales + inputs * OUTPUTS // 2, scales
