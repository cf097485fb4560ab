"""The rows of a forward, told which request they belong to, in one call by addresses: a dozen small array operations otherwise."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from .addresses import flags, floats, floats_3d, numbers, pointer
from .selection import CacheColumns, follow

COLUMNS = np.dtype([(name, np.int64) for name in ("real", "last", "sums", "seen", "rows", "columns", "layers")], align=True)
"""Of `selection.CacheColumns`: addresses, then B, C and L."""


# Numbers one by one: see `whole_layer.run_chosen`.
@njit(nogil=True, cache=True)
def follow_at(
    of: int, length: int, tokens: int, kinds: int, mask: int, masked: int, positions: int, placed: int, rows: int
) -> None:
    """`selection.follow` for B x tokens rows, by addresses of a COLUMNS and the arrays; mask [B, masked], positions [placed, tokens]."""
    known = carray(pointer(of), 1, COLUMNS)[0]
    count, wide, layers = known.rows, known.columns, known.layers
    states = floats_3d(known.sums, count * wide, layers, 2), floats(known.seen, count * wide, 2)
    columns = CacheColumns(flags(known.real, 1, count, wide)[0], numbers(known.last, 1, count)[0], states[0], states[1])
    total = count * tokens
    follow(
        columns,
        length,
        numbers(kinds, 1, total)[0],
        numbers(mask, count, masked),
        numbers(positions, placed, tokens),
        numbers(rows, 3, total),
    )
