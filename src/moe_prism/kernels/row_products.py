"""Products of few rows with the weights that each of them asks for, one call each.

The tiles are those of the jobs (`block_jobs.py`), so that every sum is the job's to the last bit. Shapes: S rows of a result, each with its
row of x and its expert (or slot of an arena).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .tiles import COLUMNS, LANES, NARROW, ROWS, VECTORS, add, dot, size_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@njit(nogil=True, cache=True)
def alike(expert: Ints, s: int) -> int:
    """How many rows from s on have its expert, at most as many as a tile has rows."""
    end = s + 1
    while end < len(expert) and end - s < ROWS and expert[end] == expert[s]:
        end += 1
    return end - s


# `dots` and `adds` keep more than six parameters: numba unpacks an object anew at every call, and a call lasts microseconds.
@njit(nogil=True, cache=True)
def dots(x: Floats, row: Ints, expert: Ints, last: int, table: Ints, columns: int, order: Ints, out: Floats, like: Any) -> None:
    """out[s, column + j * step] = x[row[s]] . (row j of the expert's weights), j < columns, for every part in `table`.

    table: of `decode_products.table_of`. Neighbours with the same expert share its weights, as many as a tile has rows. Ids of experts
    are clamped to 0..last.
    order: 0, 1, ..., at least S of them; rows of x and out contiguous, d a multiple of LANES.
    like: `decode_products.like_of` the weights' dtype.
    """
    ldx, ldo, depth = x.strides[0] // 4, out.strides[0] // 4, x.shape[1]
    size = size_of(like)
    s = 0
    while s < len(row):
        rows = alike(expert, s)
        wide = COLUMNS[rows - 1]
        for p in range(len(table)):
            ldw, ldj = table[p, 2], table[p, 4]
            w = table[p, 0] + size * min(max(expert[s], 0), last) * table[p, 1]
            target = out.ctypes.data + 4 * table[p, 3]
            ids, o, j = row.ctypes.data + 8 * s, order.ctypes.data + 8 * s, 0
            while j < columns:
                c = wide if j + wide <= columns else NARROW if wide > NARROW and j + NARROW <= columns else 1
                dot(rows, c, 0, x.ctypes.data, ids, ldx, w + size * j * ldw, ldw, depth, target + 4 * j * ldj, o, ldo, ldj, like)
                j += c
        s += rows


@njit(nogil=True, cache=True)
def adds(a: Floats, factor: Floats, expert: Ints, table: Ints, order: Ints, out: Floats, like: Any) -> None:
    """out[s] = sum over j of (factor[s] a[s, j]) x (row j of the expert's weights, the one part in `table`). a [S, m], out [S, d]."""
    depth, width, ldo = a.shape[1], out.shape[1], out.strides[0] // 4
    scaled = np.empty((ROWS, depth), np.float32)
    ldw, size = table[0, 2], size_of(like)
    s = 0
    while s < len(a):
        rows = alike(expert, s)
        for r in range(rows):
            for j in range(depth):
                scaled[r, j] = a[s + r, j] * factor[s + r]
            for j in range(width):
                out[s + r, j] = np.float32(0)
        w, c, wide = table[0, 0] + size * expert[s] * table[0, 1], 0, VECTORS[rows - 1]
        while c < width:
            v = wide if c + wide * LANES <= width else 1
            at = order.ctypes.data + 8 * s
            add(rows, v, 0, scaled.ctypes.data, depth, w + size * c, ldw, depth, out.ctypes.data + 4 * c, at, ldo, like)
            c += v * LANES
        s += rows
    scaled[0, 0] = 0  # alive until here: above only its address is used
