"""The two functions of `few.py` over bfloat16 weights. Not part of it so that nobody compiles what he does not use."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .halves import add, dot
from .tiles import LANES, NARROW, VECTORS, WIDE

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@njit(nogil=True, cache=True)
def dots(x: Floats, row: Ints, expert: Ints, last: int, table: Ints, columns: int, order: Ints, out: Floats) -> None:
    """As `few.dots`."""
    ldx, ldo, depth = x.strides[0] // 4, out.strides[0] // 4, x.shape[1]
    for s in range(len(row)):
        for p in range(len(table)):
            ldw, ldj = table[p, 2], table[p, 4]
            w = table[p, 0] + 2 * min(max(expert[s], 0), last) * table[p, 1]
            target = out.ctypes.data + 4 * table[p, 3]
            ids, o, j = row.ctypes.data + 8 * s, order.ctypes.data + 8 * s, 0
            while j < columns:
                c = WIDE if j + WIDE <= columns else NARROW if j + NARROW <= columns else 1
                dot(1, c, x.ctypes.data, ids, ldx, w + 2 * j * ldw, ldw, depth, target + 4 * j * ldj, o, ldo, ldj)
                j += c


@njit(nogil=True, cache=True)
def adds(a: Floats, factor: Floats, expert: Ints, table: Ints, order: Ints, out: Floats) -> None:
    """As `few.adds`."""
    depth, width, ldo = a.shape[1], out.shape[1], out.strides[0] // 4
    scaled = np.empty((1, depth), np.float32)
    ldw = table[0, 2]
    for s in range(len(a)):
        for j in range(depth):
            scaled[0, j] = a[s, j] * factor[s]
        for j in range(width):
            out[s, j] = np.float32(0)
        w, c = table[0, 0] + 2 * expert[s] * table[0, 1], 0
        while c < width:
            v = VECTORS if c + VECTORS * LANES <= width else 1
            add(1, v, scaled.ctypes.data, depth, w + 2 * c, ldw, depth, out.ctypes.data + 4 * c, order.ctypes.data + 8 * s, ldo)
            c += v * LANES
    scaled[0, 0] = 0  # alive until here: above only its address is used
