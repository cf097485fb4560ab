"""Computing from planes as they lie in an arena. Shapes: A places, T tokens, S slots, E experts, N sub-experts per expert, d hidden."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from ..elastic.execute.from_planes import from_planes
from ..elastic.planes import PlanePlaces, offset_of, read_of
from ..errors import UsageError
from ..kernels import threads
from ..kernels.plane_rows import PlaneForm, PlaneSlots, Records, plane_outputs
from ..kernels.plane_tiles import AVAILABLE
from ..model import MoELayer
from .plane_layout import PlaneLayout, PlaneMatrix
from .plane_wanted import PlaneWanted
from .wanted import Floats, Ints

FEW_WORK = 1 << 22
"""Multiplications up to which one thread computes slot by slot; beyond, all threads share out groups of slots."""


class ArenaPlanes:
    """A matrix of all blocks of a layer, its planes wherever they lie: what `from_planes` reads of `planes.PackedPlanes`."""

    def __init__(self, layout: PlaneLayout, matrix: PlaneMatrix, inputs: int, places: PlanePlaces) -> None:
        self.inputs, self.group = inputs, layout.group
        self._tile = matrix.tile
        self.places = PlanePlaces(places.upper + matrix.at, places.lower + matrix.scales)

    def offset(self, bits: int) -> float:
        return offset_of(bits, centred=True)

    def form(self, bits: int) -> list[int]:
        return [self._tile, self.inputs // self.group, self.group // 8, *read_of(bits)]


class PlaneArena:
    """`slots` records in anonymous, page-aligned memory: `memory` uint8 [A, bytes]."""

    def __init__(self, slots: int, layout: PlaneLayout, like: MoELayer) -> None:
        if not (AVAILABLE and threads.can_share()):
            raise UsageError("this processor has no products of bytes, which records of planes need", "pack without planes")
        self.mapped = mmap.mmap(-1, slots * layout.bytes)
        self.memory = torch.frombuffer(self.mapped, dtype=torch.uint8).view(slots, layout.bytes)
        self.layout, self.like = layout, like
        self._address, self._size, self._weights = self.memory.data_ptr(), layout.bytes, layout.weights
        first, down = layout.first, layout.down
        offsets = np.array([0.0, *(offset_of(bits, centred=True) for bits in range(1, 9))], np.float32)
        self._form = PlaneForm(
            layout.block, layout.group, first[-1].at, first[0].tile, first[0].scales, down.at, down.tile, down.scales, offsets
        )
        self._is_gated = bool(like.is_silu) and layout.has_gate

    @property
    def bytes(self) -> int:
        return len(self.mapped)

    def is_few(self, wanted: PlaneWanted) -> bool:
        """Whether slot by slot is the way."""
        return self._is_gated and len(wanted.row) * self._weights <= FEW_WORK

    def outputs(self, x: Tensor, wanted: PlaneWanted, which: Ints, places: Ints, out: Floats) -> None:
        """out[s] [S, d] = weight x output of the slots `which`. places [E N, 2]: where both planes of every block lie."""
        if len(which):
            memory = Records(self._address, self._size, places)
            slots = PlaneSlots(wanted.block, wanted.end, wanted.row, wanted.weight, wanted.bits)
            plane_outputs(x.contiguous().detach().numpy(), slots, which, memory, self._form, out)

    def add(self, x: Tensor, wanted: PlaneWanted, part: tuple[int, int], places: Ints, out: Tensor) -> None:
        """out [T, d] += the outputs of sub-experts part[0]..part[1] - 1."""
        layout, parts = self.layout, wanted.widths.shape[2]
        upper, lower = (self._address + torch.from_numpy(places[:, plane]) * self._size for plane in range(2))
        where = PlanePlaces(upper, lower - upper)
        matrices = [ArenaPlanes(layout, m, layout.hidden, where) for m in layout.first]
        matrices.append(ArenaPlanes(layout, layout.down, layout.block, where))
        number = wanted.index[:, :, None] * parts + torch.arange(parts)
        low, high = int(wanted.block[part[0]]), int(wanted.block[part[1] - 1])
        mine = (number >= low) & (number <= high)
        for bits in np.unique(wanted.bits[wanted.begin[part[0]] : wanted.end[part[1] - 1]]).tolist():
            keep = mine & (wanted.widths == bits)
            found = from_planes(self.like, matrices, bits, (x, wanted.index, wanted.weights, keep))
            if found is None:
                raise UsageError("a token has one expert twice", "run it without --expert-memory")
            out += found
