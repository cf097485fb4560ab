"""Which size of cells suits a group of weights best, for all widths of a nested file at once: in one pass over what lies in the cache.

Shapes: n groups of g weights, R sizes to choose from.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@njit(nogil=True, cache=True, error_model="numpy")
def best_cells(values: Floats, cells: Floats, base: int, planes: int, best: Ints) -> None:
    """best[i] = the r with the least error of cells[r, i]; values [n, g], cells [R, n].

    The error is that of every width from `base` to base + planes bits, squared, each counted four times as much as the one before. Sums
    are made in one order, so the choice is the same on every processor.
    """
    size, half = values.shape[1], np.float32(2.0 ** (base - 1))
    found, scaled = np.empty(size, np.float32), np.empty(size, np.float32)
    for i in range(len(values)):
        least = np.float32(np.inf)
        for r in range(len(cells)):
            cell = cells[r, i]
            for j in range(size):
                scaled[j] = values[i, j] / cell + half
                found[j] = np.float32(0)
            for p in range(planes + 1):
                steps = np.float32(2.0**p)
                top = np.float32(2.0 ** (base + p) - 1)
                for j in range(size):
                    wide = scaled[j] * steps
                    code = min(max(np.floor(wide), np.float32(0)), top)
                    off = code + np.float32(0.5) - wide  # in cells of this width: four times as much as of the one before
                    found[j] += off * off
            total = np.float32(0)
            for j in range(size):
                total += found[j]
            total *= cell * cell
            if total < least:
                least, best[i] = total, r
