"""Products of groups of slots with weights in planes (`plane_tiles.py`), shared out among threads as `block_jobs.py` does it.

Shapes: S slots, R rows of i inputs in G groups of g.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc, njit
from numpy.typing import NDArray

from .block_jobs import JOB
from .plane_tiles import OUTPUTS, ROWS, TILES, multiply
from .tiles import read, take

CHUNK = 8
"""Tiles of outputs of a unit of work."""
LARGEST = 32639.0  # of an input as a whole number: its upper byte is 127 at most, since lower bytes have a sign


@njit(nogil=True, cache=True, error_model="numpy")
def in_bytes(
    x: NDArray[np.float32], group: int, offset: float, unit: float, whole: NDArray[np.int8], scales: NDArray[np.float32]
) -> None:
    """Rows x [R, i] as whole numbers: whole [R, G, 2, g], upper and lower bytes; scales [R, G, 2]: of a sum of codes, and its offset.

    A weight is (code x unit + offset) x its scale. A group with a value that is not finite gives NaN.
    """
    for r in range(len(x)):
        for g in range(whole.shape[1]):
            most, size = np.float32(0), np.float32(0)
            for j in range(group):
                value = abs(x[r, g * group + j])
                most, size = max(most, value), size + value
            scale, total = most / np.float32(LARGEST), 0
            inverse = np.float32(1) / scale if scale > 1e-37 else np.float32(0)
            if not np.isfinite(size):
                scale, inverse = np.float32(np.nan), np.float32(0)
            for j in range(group):
                code = int(np.rint(x[r, g * group + j] * inverse)) if inverse > 0 else 0
                low = ((code + 128) & 255) - 128
                whole[r, g, 0, j], whole[r, g, 1, j] = (code - low) >> 8, low
                total += code
            scales[r, g, 0], scales[r, g, 1] = scale * np.float32(unit), scale * np.float32(offset * total)


# Keeps more than six parameters, as `multiply` does.
@njit(nogil=True, inline="always")
def tiles_of(
    form: tuple[int, int, int, int, int, int],
    begin: int,
    end: int,
    first: int,
    last: int,
    x: int,
    scales: int,
    ids: int,
    w: int,
    out: int,
    o: int,
    ldo: int,
    adds: int,
) -> None:
    """All rows begin..end - 1 and tiles first..last - 1. w, out: of the first tile of all.

    form: bytes of a tile, groups, lines of a group, bytes from a tile to its lower plane, mask, whether that plane is read.
    """
    ldw, groups, lines, lower, mask, both = form
    t = first
    while t < last:
        s, most = begin, 1
        while s < end:
            rows = min(ROWS, end - s)
            wide = TILES[rows - 1]
            tiles = wide if t + wide <= last else 1
            # Rows that are left over take as many tiles as the first ones did, one after the other.
            if s == begin:
                most = tiles
            done = 0
            while done < most:
                step = tiles if done + tiles <= most else 1
                at = t + done
                multiply(
                    both, rows, step, x, scales, ids + 8 * s, w + at * ldw, ldw, groups, lines, lower, mask,
                    out + 4 * OUTPUTS * at, o + 8 * s, ldo, adds,
                )  # fmt: skip
                done += step
            s += rows
        t += most


@njit(nogil=True, inline="always")
def _form(job: int, group: int) -> tuple[int, int, int, int, int, int]:
    return read(job, 1), read(job, 2), read(job, 3), read(read(job, 6), group), read(job, 4), read(job, 5)


@cfunc(JOB, cache=True)
def dot_job(job: int) -> None:
    """out[o, part's columns] = x[row] . w for every slot (row, o) of the active groups: as `from_planes` writes it.

    A unit is CHUNK tiles of one part of one group.
    """
    x, scales, out, ldo, rows, o = read(job, 7), read(job, 8), read(job, 9), read(job, 10), read(job, 11), read(job, 12)
    offsets, active, first, last = read(job, 13), read(job, 14), read(job, 15), read(job, 16)
    tiles, parts = read(job, 17), read(job, 18)
    chunks = (tiles + CHUNK - 1) // CHUNK
    unit = take(job)
    while unit < (last - first) * parts * chunks:
        group = read(active, first + unit // (parts * chunks))
        part, t = unit // chunks % parts, unit % chunks * CHUNK
        w, form = read(read(job, 19 + part), group), _form(job, group)
        begin, end = read(offsets, group), read(offsets, group + 1)
        target = out + 4 * OUTPUTS * tiles * part
        tiles_of(form, begin, end, t, min(tiles, t + CHUNK), x, scales, rows, w, target, o, ldo, 0)
        unit = take(job)


@cfunc(JOB, cache=True)
def add_job(job: int) -> None:
    """out[row] += a[s] . w for every slot s of the active groups, in their order.

    A unit is a strip of tiles through all groups: no two threads write to the same place.
    """
    x, scales, out, ldo, rows, own = read(job, 7), read(job, 8), read(job, 9), read(job, 10), read(job, 11), read(job, 12)
    offsets, active, first, last = read(job, 13), read(job, 14), read(job, 15), read(job, 16)
    tiles, strip = read(job, 17), read(job, 18)
    unit = take(job)
    while unit * strip < tiles:
        left, right = unit * strip, min(tiles, unit * strip + strip)
        for at in range(first, last):
            group = read(active, at)
            w, form = read(read(job, 19), group), _form(job, group)
            tiles_of(form, read(offsets, group), read(offsets, group + 1), left, right, x, scales, own, w, out, rows, ldo, 1)
        unit = take(job)
