"""Reading records without Python: one call per job, so that reader threads and the thread that computes do not wait for each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from .checksum import checksum
from .pack import Pack

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

RUN = 8  # neighbouring records read by one call at most
OK, FAILED, SHORT, WRONG = range(4)
REASONS = {FAILED: "the read failed", SHORT: "the file is cut short", WRONG: "wrong checksum"}

_preadv = types.ExternalFunction("preadv", types.intp(types.intc, types.intp, types.intc, types.int64))


class RecordForm(NamedTuple):
    """Where the records of a packed file lie and how long they are, as compiled code wants it: the exact ones and the int8 ones."""

    start: int  # byte offset of the first record
    low_start: int
    bytes: int  # of a record
    low_bytes: int
    records: int  # of either form
    rows: int  # of a record's weights, `hidden` numbers each
    hidden: int
    widens: bool  # whether compiled code can widen the int8 form


class Destination(NamedTuple):
    """Where records are read to, and what they must look like."""

    words: Words  # [S, bytes / 8] the arena
    bytes: Bytes  # [S, bytes] the same memory
    sums: Words  # checksums of the records, then of their int8 forms
    form: RecordForm

    @classmethod
    def of(cls, pack: Pack, arena: Bytes) -> Destination:
        """An arena [S, bytes] for the records of a packed file."""
        layout = pack.layout
        widens = layout.dtype == "bfloat16" and not layout.has_bias
        sizes = (pack.start, pack.low_start, layout.bytes, layout.low_bytes, len(pack.space))
        # The checksums are copied because those of a file are read-only, and a read-only array is another type to the compiler.
        return cls(arena.view(np.uint64), arena, np.array(pack.sums), RecordForm(*sizes, layout.rows, layout.hidden, widens))


@njit(nogil=True, cache=True)
def read_records(descriptor: int, words: Words, slots: Ints, places: Ints, skip: int, sums: Words) -> Ints:
    """Read records into slots of the arena words [S, n], behind their first `skip` words, and check them: OK or what is wrong, each.

    places: byte offsets in the file, ascending; neighbours are read by one preadv, at most RUN of them; sums: checksums, by record.
    """
    count, size = len(slots), (words.shape[1] - skip) * 8
    found = np.zeros(count, np.int64)
    pieces = np.empty((RUN, 2), np.int64)  # what preadv calls an iovec: address and length
    first = 0
    while first < count:
        last = first
        while last < count and last - first < RUN and places[last] == places[first] + (last - first) * size:
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
def widen_bfloat16(slot: Bytes, rows: int, hidden: int, head: int) -> None:
    """`Layout.raise_` of a bfloat16 layout without biases: int8 steps at the end of a slot (bytes) become the record, in place.

    head: where the int8 form begins in the slot, with the scales.
    """
    # In place is possible because a row of bfloat16 is as long as two rows of int8 steps, which lie at the end of the slot: what is
    # written never overtakes what is still to be read. One row is widened first and stored afterwards, for the last row meets itself.
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
        # round to the nearest bfloat16, ties to even, as torch does: the upper half of the float32 after adding just below half a step
        for j in range(hidden):
            b = bits[j]
            wide[r * hidden + j] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
