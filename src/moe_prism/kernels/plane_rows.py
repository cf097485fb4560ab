"""Outputs of few slots whose planes lie in records of an arena (`store/plane_layout.py`): each at its own width, one call for all.

Shapes: T tokens, S slots, d hidden, m neurons of a sub-expert, G groups of g inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .activation import silu_times
from .plane_jobs import in_bytes, tiles_of
from .plane_tiles import OUTPUTS

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
UPPER = 4  # bits of the first plane


class PlaneForm(NamedTuple):
    """Bytes within a record. up, down: where those matrices begin; *_tile: bytes of their tiles; *_scales: of them scales.

    offsets [9]: of `planes.offset_of`, by bits.
    """

    block: int
    group: int
    up: int
    first_tile: int
    first_scales: int
    down: int
    down_tile: int
    down_scales: int
    offsets: Floats


class Records(NamedTuple):
    """address: of the arena; size: bytes of a record; places [E N, 2]: where the records of both planes of every block lie."""

    address: int
    size: int
    places: Ints


class PlaneSlots(NamedTuple):
    """block [G]: sub-experts; end [G]: where the slots of each end; row [S]: token of a slot; weight, bits [S]."""

    block: Ints
    end: Ints
    row: Ints
    weight: Floats
    bits: Ints


@njit(nogil=True, cache=True)
def plane_outputs(x: Floats, slots: PlaneSlots, which: Ints, memory: Records, form: PlaneForm, out: Floats) -> None:
    """out[s] [S, d] = weight x output of a gated sub-expert (silu) for row row[s] of x [T, d], for the slots `which`, ascending.

    As `elastic.execute.from_planes`, to a rounding of sums.
    """
    hidden, group, block = x.shape[1], form.group, form.block
    whole = np.empty((len(x), hidden // group, 2, group), np.int8)
    sums = np.empty((len(x), hidden // group, 2), np.float32)
    in_bytes(x, group, 1.0, 1.0, whole, sums)
    scales = np.empty((hidden // group, 2), np.float32)
    own_whole, own_scales = np.empty((1, block // group, 2, group), np.int8), np.empty((1, block // group, 2), np.float32)
    pre, a, first = np.empty(2 * block, np.float32), np.empty((1, block), np.float32), np.zeros(1, np.int64)
    lines, at = group // 8, 0
    for s in which:
        while slots.end[at] <= s:
            at += 1
        upper = memory.address + memory.size * memory.places[slots.block[at], 0]
        lower = memory.size * (memory.places[slots.block[at], 1] - memory.places[slots.block[at], 0])
        bits, both, t = slots.bits[s], 1 if slots.bits[s] > UPPER else 0, slots.row[s]
        unit = np.float32(0.0625) if both else np.float32(1)
        mask = 0x01010101 * ((0xF << ((2 * UPPER if both else UPPER) - bits)) & 0xF)
        for g in range(len(scales)):
            scales[g, 0], scales[g, 1] = sums[t, g, 0] * unit, sums[t, g, 1] * form.offsets[bits]
        shape = (form.first_tile, hidden // group, lines, lower + form.first_scales, mask, both)
        for part in range(2):
            tiles_of(
                shape, 0, 1, 0, block // OUTPUTS, whole.ctypes.data + 2 * hidden * t, scales.ctypes.data, first.ctypes.data,
                upper + part * form.up, pre.ctypes.data + 4 * part * block, first.ctypes.data, 0, 0,
            )  # fmt: skip
        silu_times(pre.ctypes.data, pre.ctypes.data + 4 * block, block, slots.weight[s], a.ctypes.data)
        in_bytes(a, group, form.offsets[bits], unit, own_whole, own_scales)
        shape = (form.down_tile, block // group, lines, lower + form.down_scales, mask, both)
        tiles_of(
            shape, 0, 1, 0, hidden // OUTPUTS, own_whole.ctypes.data, own_scales.ctypes.data, first.ctypes.data,
            upper + form.down, out.ctypes.data + 4 * s * hidden, first.ctypes.data, 0, 0,
        )  # fmt: skip
    # Above only their addresses are used: they live until here.
    whole[0, 0, 0, 0], scales[0, 0], own_whole[0, 0, 0, 0], own_scales[0, 0, 0], pre[0], a[0, 0], first[0] = 0, 0, 0, 0, 0, 0, 0
