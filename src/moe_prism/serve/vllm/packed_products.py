"""Products of the rows of a batch with packed blocks of weights, grouped by block and shared out among torch's threads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from numba import cfunc, njit
from torch import Tensor

from ...kernels import threads
from ...kernels.block_jobs import group
from ...kernels.packed_tiles import SIDES, WIDTH, packed
from ...kernels.tiles import read, take

JOB = "void(intp)"
ROWS, COLUMNS = SIDES[0][0], SIDES[1][0]
CHUNK = 8  # columns (of 16 values) of a unit of work


@njit(inline="always")
def _side(left: int, most: int) -> int:
    """The largest side of a tile that fits what is left."""
    side = 6 if left >= 6 else 4 if left >= 4 else 2 if left >= 2 else 1
    return min(side, most)


# Keeps more than six parameters, as `packed` does: the addresses and steps of a tile, one by one. It is inlined, none is passed.
@njit(inline="always")
def _product(
    half: int,
    begin: int,
    end: int,
    first: int,
    last: int,
    x: int,
    ids: int,
    ldx: int,
    w: int,
    ldw: int,
    depth: int,
    out: int,
    o: int,
    ldo: int,
) -> None:
    """All tiles of rows begin..end - 1 and columns first..last - 1; `ids` and `o` have one entry per row."""
    size = 2 if half else 4
    c = first
    while c < last:
        columns = _side(min(last - c, 5), COLUMNS)
        s = begin
        while s < end:
            rows = _side(end - s, ROWS)
            here, there = w + size * c * ldw, out + 4 * WIDTH * c
            packed(half, rows, columns, x, ids + 8 * s, ldx, here, ldw, depth, there, o + 8 * s, ldo)
            s += rows
        c += columns


@cfunc(JOB, cache=True)
def dot_job(job: int) -> None:
    """out[o] += x[row] . w for every slot of the active groups. A unit is CHUNK columns of one part of one group. job: see `dot`."""
    x, ldx, depth, out, ldo = read(job, 1), read(job, 2), read(job, 3), read(job, 4), read(job, 5)
    rows, o, offsets, active, count = read(job, 6), read(job, 7), read(job, 8), read(job, 9), read(job, 10)
    w, w_expert, n_sub, columns, parts, jump = (
        read(job, 11),
        read(job, 12),
        read(job, 13),
        read(job, 14),
        read(job, 15),
        read(job, 16),
    )
    half = read(job, 17)
    size, ldw = 2 if half else 4, depth * WIDTH
    chunks = (columns + CHUNK - 1) // CHUNK
    unit = take(job)
    while unit < count * parts * chunks:
        at = read(active, unit // (parts * chunks))
        part, first = unit // chunks % parts, unit % chunks * CHUNK
        base = w + size * (at // n_sub * w_expert + (part * jump + at % n_sub * columns) * ldw)
        begin, end, last = read(offsets, at), read(offsets, at + 1), min(columns, first + CHUNK)
        _product(half, begin, end, first, last, x, rows, ldx, base, ldw, depth, out + 4 * WIDTH * part * columns, o, ldo)
        unit = take(job)


@cfunc(JOB, cache=True)
def add_job(job: int) -> None:
    """out[row] += a[slot] . w for every slot of the active groups, in their order.

    job: see `add`. A unit is a strip of out's columns, for all groups: no two threads write to the same place.
    """
    a, lda, depth, out, ldo = read(job, 1), read(job, 2), read(job, 3), read(job, 4), read(job, 5)
    slots, rows, offsets, active, count = read(job, 6), read(job, 7), read(job, 8), read(job, 9), read(job, 10)
    w, w_expert, n_sub, columns, ldw, strip = (
        read(job, 11),
        read(job, 12),
        read(job, 13),
        read(job, 14),
        read(job, 15),
        read(job, 16),
    )
    half = read(job, 17)
    size = 2 if half else 4
    unit = take(job)
    while unit * strip < columns:
        first, last = unit * strip, min(columns, unit * strip + strip)
        for i in range(count):
            at = read(active, i)
            base = w + size * (at // n_sub * w_expert + at % n_sub * depth * WIDTH)
            begin, end = read(offsets, at), read(offsets, at + 1)
            _product(half, begin, end, first, last, a, slots, lda, base, ldw, depth, out, rows, ldo)
        unit = take(job)


class PackedGroups(NamedTuple):
    """Slots sorted by sub-expert, then token. row (token), choice (token * k + choice) and slot (0..S-1) [S] int64;
    offset [E N + 1]; active: groups that have slots.
    """

    row: Tensor
    choice: Tensor
    slot: Tensor
    offset: Tensor
    active: Tensor
    n_sub: int

    @classmethod
    def of(cls, index: Tensor, keep: Tensor, experts: int) -> PackedGroups:
        """index [T, k] int64, keep [T, k, N] bool."""
        row, choice, offset, active, _ = group(index.numpy(), keep.numpy(), experts)
        whole = torch.from_numpy
        return cls(whole(row), whole(choice), torch.arange(len(row)), whole(offset), whole(active), keep.shape[2])

    def numbers(self) -> list[int]:
        return [self.offset.data_ptr(), self.active.data_ptr(), len(self.active)]


def dot(x: Tensor, groups: PackedGroups, w: Tensor, parts: int, target: Tensor, out: Tensor) -> None:
    """out[target[s]] += for every part the product of x[row[s]] with the part's block of w. x [T, d], out [*, *]: float32.

    w [E, P, d, 16] packed; a block is P / (parts N) of its columns, block n of part p begins at column p P / parts + n blocks.
    """
    experts_stride, jump = w.stride(0), w.shape[1] // parts
    columns = jump // groups.n_sub
    values = [x.data_ptr(), x.stride(0), x.shape[1], out.data_ptr(), out.stride(0), groups.row.data_ptr(), target.data_ptr()]
    values += [*groups.numbers(), w.data_ptr(), experts_stride, groups.n_sub, columns, parts, jump, _is_half(w)]
    threads.run(dot_job, values, len(groups.row) * parts * columns * WIDTH * x.shape[1])


def add(a: Tensor, groups: PackedGroups, w: Tensor, out: Tensor) -> None:
    """out[row[s]] += a[s] . block of w. a [S, m], out [T, d]: float32; w [E, d / 16, f, 16] packed, block n its rows n m..n m + m - 1."""
    depth, columns = a.shape[1], w.shape[1]
    work = len(a) * depth * columns * WIDTH
    count = 1 if work < threads.ONE_THREAD_WORK else torch.get_num_threads()
    strip = -(-columns // (CHUNK * count)) * CHUNK
    values = [a.data_ptr(), a.stride(0), depth, out.data_ptr(), out.stride(0), groups.slot.data_ptr(), groups.row.data_ptr()]
    values += [*groups.numbers(), w.data_ptr(), w.stride(0), groups.n_sub, columns, w.stride(1), strip, _is_half(w)]
    threads.run(add_job, values, work)


def _is_half(w: Tensor) -> int:
    return int(w.dtype == torch.bfloat16)
