"""Reading records without Python: one call per job, so that reader threads and the thread that computes do not wait for each other."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from .checksum import checksum

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

OK, FAILED, SHORT, WRONG = range(4)
REASONS = {FAILED: "the read failed", SHORT: "the file is cut short", WRONG: "wrong checksum"}

_preadv = types.ExternalFunction("preadv", types.intp(types.intc, types.intp, types.intc, types.int64))


@njit(nogil=True, cache=True)
def read_records(descriptor: int, words: Words, slots: Ints, places: Ints, skip: int, run: int, sums: Words) -> Ints:
    """Read records into slots of the arena words [S, n], behind their first `skip` words, and check them: OK or what is wrong, each.

    places: byte offsets in the file, ascending; neighbours are read by one preadv, at most `run` of them; sums: checksums, by record.
    """
    count, size = len(slots), (words.shape[1] - skip) * 8
    found = np.zeros(count, np.int64)
    pieces = np.empty((run, 2), np.int64)
    first = 0
    while first < count:
        last = first
        while last < count and last - first < run and places[last] == places[first] + (last - first) * size:
            pieces[last - first, 0] = words.ctypes.data + 8 * (slots[last] * words.shape[1] + skip)
            pieces[last - first, 1] = size
            last += 1
        got = _preadv(descriptor, pieces.ctypes.data, last - first, places[first])
        for i in range(first, last):
            if got < 0:
                found[i] = FAILED
            elif got < (i - first + 1) * size:
                found[i] = SHORT
            elif checksum(words[slots[i], skip:]) != sums[i]:
                found[i] = WRONG
        first = last
    return found


@njit(nogil=True, cache=True)
def widen_bfloat16(slot: NDArray[np.uint8], rows: int, hidden: int, head: int) -> None:
    """`Layout.raise_` of a bfloat16 layout without biases: int8 steps at the end of a slot (bytes) become the record, in place.

    head: where the int8 form begins in the slot, with the scales.
    """
    size = len(slot)
    scale = slot[head : head + 4 * rows].copy().view(np.float32)
    wide = slot[: 2 * rows * hidden].view(np.uint16)
    values = np.empty(hidden, np.float32)
    bits = values.view(np.uint32)
    for r in range(rows):
        start = size - (rows - r) * hidden
        steps = slot[start : start + hidden].view(np.int8)
        for j in range(hidden):
            values[j] = np.float32(steps[j]) * scale[r]
        for j in range(hidden):
            b = bits[j]
            wide[r * hidden + j] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
