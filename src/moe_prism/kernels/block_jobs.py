"""Two matrix products over groups of slots, shared out among threads, and the grouping itself.

A group is the slots of one sub-expert (or, for a predictor, the choices of one expert). Both products read the weights where the layer
stores them and the rows where the batch has them: nothing is gathered, nothing is packed. A job is an array of int64 (addresses, strides
in float32 elements, sizes) that every thread reads; units of work are taken from a shared counter.

Units are taken and not dealt out: groups differ in size, and a core that is busy elsewhere would make all others wait for its share.
No result depends on who computes it. In the first product every unit has outputs of its own; in the second a unit is a strip of columns
through all groups, because the slots of one token lie in several groups and are added to the same row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, njit
from numpy.typing import NDArray

from .tiles import COLUMNS, DEPTH, LANES, MANY, NARROW, ROWS, VECTORS, add, dot, read, size_of, take

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
JOB = "void(intp)"

CHUNK = 32  # columns of a unit of the dot job: as few as make taking it cheap, so that the last units are short
FAR = 2048  # bytes from one row of weights to the next that the processor does not see coming by itself


@njit(nogil=True, cache=True)
def even(rows: int) -> int:
    """Rows of the tiles that `rows` > 0 are cut into, so that none is much smaller than the others: a core is busy with many sums only."""
    if rows <= ROWS:
        return rows
    tiles = (rows + MANY - 1) // MANY
    return (rows + tiles - 1) // tiles


@njit(nogil=True, cache=True)
def dot_units(job: int, like: Any) -> None:
    """out[o, j] = x[row] . w[j] for every slot (row, o) of the active groups and every column j of every part.

    job: as `batch_products.dot` writes it; like: as in `tiles.dot`. A unit is CHUNK columns of one part of one group.
    """
    x, ldx, depth, out, ldo = read(job, 1), read(job, 2), read(job, 3), read(job, 4), read(job, 5)
    rows, o, offsets, active = read(job, 6), read(job, 7), read(job, 8), read(job, 9)
    first, last, n_sub, columns, parts = read(job, 10), read(job, 11), read(job, 12), read(job, 13), read(job, 14)
    chunks, size = (columns + CHUNK - 1) // CHUNK, size_of(like)
    units = (last - first) * parts * chunks
    unit = take(job)
    while unit < units:
        group = read(active, first + unit // (parts * chunks))
        part = job + 8 * (15 + 6 * (unit // chunks % parts))
        begin, end = read(offsets, group), read(offsets, group + 1)
        ldw, ldj = read(part, 3), read(part, 5)
        w = read(part, 0) + size * (group // n_sub * read(part, 1) + group % n_sub * read(part, 2))
        target = out + 4 * read(part, 4)
        j = unit % chunks * CHUNK
        stop = min(columns, j + CHUNK)
        height, far = even(end - begin), int(end - begin > 1 and ldw * size >= FAR)
        wide = COLUMNS[height - 1]
        while j < stop:
            # Columns outside, rows inside: a column's weights, which are the larger part, are in the cache for all rows of the group.
            c = wide if j + wide <= stop else NARROW if wide > NARROW and j + NARROW <= stop else 1
            s = begin
            while s < end:
                r = min(height, end - s)
                dot(
                    r,
                    c,
                    far if s == begin else 0,
                    x,
                    rows + 8 * s,
                    ldx,
                    w + size * j * ldw,
                    ldw,
                    depth,
                    target + 4 * j * ldj,
                    o + 8 * s,
                    ldo,
                    ldj,
                    like,
                )
                s += r
            j += c
        unit = take(job)


@njit(nogil=True, cache=True)
def add_units(job: int, like: Any) -> None:
    """out[row] += sum over j < depth of a[s, j] w[j] for every slot s of the active groups, in their order.

    job: as `batch_products.add` writes it; like: as in `tiles.dot`.
    A unit is a strip of out's columns, for all groups: no two threads write to the same place.
    """
    a, lda, depth, out, ldo = read(job, 1), read(job, 2), read(job, 3), read(job, 4), read(job, 5)
    rows, offsets, active, first, last = read(job, 6), read(job, 7), read(job, 8), read(job, 9), read(job, 10)
    n_sub, w0, w_expert, w_block, ldw = read(job, 11), read(job, 12), read(job, 13), read(job, 14), read(job, 15)
    width, strip, start, size = read(job, 16), read(job, 17), read(job, 18), size_of(like)
    unit = take(job)
    while unit * strip < width:
        left, right = unit * strip, min(width, unit * strip + strip)
        for at in range(first, last):
            group = read(active, at)
            begin, end = read(offsets, group), read(offsets, group + 1)
            w = w0 + size * (group // n_sub * w_expert + group % n_sub * w_block)
            height, far = even(end - begin), int(end - begin > 1 and ldw * size >= FAR)
            k = 0
            # DEPTH rows of the block at a time. The sums of a row are stored and taken up again between them, which changes no bit:
            # a register and memory hold the same float32.
            while k < depth:
                step = min(DEPTH, depth - k)
                s = begin
                while s < end:
                    r = min(height, end - s)
                    wide = VECTORS[r - 1]
                    source, ids, c = a + 4 * ((s - start) * lda + k), rows + 8 * s, left
                    while c < right:
                        v = wide if c + wide * LANES <= right else 1
                        add(
                            r,
                            v,
                            far if s == begin else 0,
                            source,
                            lda,
                            w + size * (k * ldw + c),
                            ldw,
                            step,
                            out + 4 * c,
                            ids,
                            ldo,
                            like,
                        )
                        c += v * LANES
                    s += r
                k += step
        unit = take(job)


@cfunc(JOB, cache=True)
def dot_job(job: int) -> None:
    """`dot_units` over float32 weights."""
    dot_units(job, np.float32(0))


@cfunc(JOB, cache=True)
def add_job(job: int) -> None:
    """`add_units` over float32 weights."""
    add_units(job, np.float32(0))


@njit(nogil=True, cache=True)
def group(index: Ints, keep: Flags, experts: int) -> tuple[Ints, Ints, Ints, Ints, bool]:
    """(rows, choices, offsets, active, distinct) of the kept slots of index [T, k], keep [T, k, N], sorted by sub-expert, then token.

    rows [S] and choices [S]: token, and token * k + choice, of a slot; offsets [E N + 1]; active: groups that have a slot;
    distinct: no token has one expert twice. IndexError for a kept slot of an expert that there is not: places are counted with it.
    """
    tokens, k, n_sub = keep.shape
    offsets = np.zeros(experts * n_sub + 1, np.int64)
    distinct = True
    for t in range(tokens):
        for c in range(k):
            for n in range(n_sub):
                if keep[t, c, n]:
                    if index[t, c] < 0 or index[t, c] >= experts:
                        raise IndexError("a kept slot of an expert that there is not")
                    offsets[index[t, c] * n_sub + n + 1] += 1
            for other in range(c):
                distinct &= index[t, c] != index[t, other] or not keep[t, c].any()
    active = np.flatnonzero(offsets[1:])
    for g in range(experts * n_sub):
        offsets[g + 1] += offsets[g]
    place = offsets[:-1].copy()
    rows, choices = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int64)
    for t in range(tokens):
        for c in range(k):
            for n in range(n_sub):
                if keep[t, c, n]:
                    g = index[t, c] * n_sub + n
                    rows[place[g]], choices[place[g]] = t, t * k + c
                    place[g] += 1
    return rows, choices, offsets, active, distinct
