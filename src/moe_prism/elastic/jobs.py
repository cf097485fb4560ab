"""Two matrix products over groups of slots, shared out among threads, and the grouping itself.

A group is the slots of one sub-expert (or, for a predictor, the choices of one expert). Both products read the weights where the layer
stores them and the rows where the batch has them: nothing is gathered, nothing is packed. A job is an array of int64 (addresses, strides
in float32 elements, sizes) that every thread reads; units of work are taken from a shared counter.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc, njit
from numpy.typing import NDArray

from .tiles import LANES, ROWS, add_tile, dot_tile, read, take

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
JOB = "void(intp)"

WIDE = 8 if LANES >= 8 else 4  # columns of a dot tile of few rows
FEW = 2  # rows up to which a wide tile is used
CHUNK = 32  # columns of a unit of the dot job
VECTORS = 4 if ROWS == 6 else 2  # vectors of an add tile
DEPTH = 16  # rows of w that an add tile goes through before it moves on along them

_dot1x1, _dot2x1, _dot3x1 = dot_tile(1, 1), dot_tile(2, 1), dot_tile(3, 1)
_dot4x1, _dot5x1, _dot6x1 = dot_tile(4, 1), dot_tile(5, 1), dot_tile(6, 1)
_dot1x4, _dot2x4, _dot3x4 = dot_tile(1, 4), dot_tile(2, 4), dot_tile(3, 4)
_dot4x4, _dot5x4, _dot6x4 = dot_tile(4, 4), dot_tile(5, 4), dot_tile(6, 4)
_dot1x8, _dot2x8 = dot_tile(1, WIDE), dot_tile(2, WIDE)
_add1x1, _add2x1, _add3x1 = add_tile(1, 1), add_tile(2, 1), add_tile(3, 1)
_add4x1, _add5x1, _add6x1 = add_tile(4, 1), add_tile(5, 1), add_tile(6, 1)
_add1x4, _add2x4, _add3x4 = add_tile(1, VECTORS), add_tile(2, VECTORS), add_tile(3, VECTORS)
_add4x4, _add5x4, _add6x4 = add_tile(4, VECTORS), add_tile(5, VECTORS), add_tile(6, VECTORS)


@njit(inline="always")
def _dot(r, c, x, ids, ldx, w, ldw, depth, out, o, ldo, ldj):  # type: ignore[no-untyped-def]
    """The dot tile of r rows and c columns."""
    if c == 1:
        if r == 6:
            _dot6x1(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
        elif r == 5:
            _dot5x1(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
        elif r == 4:
            _dot4x1(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
        elif r == 3:
            _dot3x1(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
        elif r == 2:
            _dot2x1(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
        else:
            _dot1x1(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
    elif r == 6:
        _dot6x4(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
    elif r == 5:
        _dot5x4(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
    elif r == 4:
        _dot4x4(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
    elif r == 3:
        _dot3x4(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
    elif r == 2:
        if c == 4:
            _dot2x4(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
        else:
            _dot2x8(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
    elif c == 4:
        _dot1x4(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)
    else:
        _dot1x8(x, ids, ldx, w, ldw, depth, out, o, ldo, ldj)


@njit(inline="always")
def _add(r, v, a, lda, w, ldw, depth, out, ids, ldo):  # type: ignore[no-untyped-def]
    """The add tile of r rows and v vectors."""
    if v == 1:
        if r == 6:
            _add6x1(a, lda, w, ldw, depth, out, ids, ldo)
        elif r == 5:
            _add5x1(a, lda, w, ldw, depth, out, ids, ldo)
        elif r == 4:
            _add4x1(a, lda, w, ldw, depth, out, ids, ldo)
        elif r == 3:
            _add3x1(a, lda, w, ldw, depth, out, ids, ldo)
        elif r == 2:
            _add2x1(a, lda, w, ldw, depth, out, ids, ldo)
        else:
            _add1x1(a, lda, w, ldw, depth, out, ids, ldo)
    elif r == 6:
        _add6x4(a, lda, w, ldw, depth, out, ids, ldo)
    elif r == 5:
        _add5x4(a, lda, w, ldw, depth, out, ids, ldo)
    elif r == 4:
        _add4x4(a, lda, w, ldw, depth, out, ids, ldo)
    elif r == 3:
        _add3x4(a, lda, w, ldw, depth, out, ids, ldo)
    elif r == 2:
        _add2x4(a, lda, w, ldw, depth, out, ids, ldo)
    else:
        _add1x4(a, lda, w, ldw, depth, out, ids, ldo)


@cfunc(JOB, cache=True)
def dot_job(job):  # type: ignore[no-untyped-def]
    """out[o, j] = x[row] . w[j] for every slot (row, o) of the active groups and every column j of every part.

    job: see `pack_dot`. A unit is CHUNK columns of one part of one group.
    """
    x, ldx, depth, out, ldo = read(job, 1), read(job, 2), read(job, 3), read(job, 4), read(job, 5)
    rows, o, offsets, active = read(job, 6), read(job, 7), read(job, 8), read(job, 9)
    first, last, n_sub, columns, parts = read(job, 10), read(job, 11), read(job, 12), read(job, 13), read(job, 14)
    chunks = (columns + CHUNK - 1) // CHUNK
    units = (last - first) * parts * chunks
    unit = take(job)
    while unit < units:
        group = read(active, first + unit // (parts * chunks))
        part = job + 8 * (15 + 6 * (unit // chunks % parts))
        begin, end = read(offsets, group), read(offsets, group + 1)
        ldw, ldj = read(part, 3), read(part, 5)
        w = read(part, 0) + 4 * (group // n_sub * read(part, 1) + group % n_sub * read(part, 2))
        target = out + 4 * read(part, 4)
        j = unit % chunks * CHUNK
        stop = min(columns, j + CHUNK)
        wide = WIDE if end - begin <= FEW else 4
        while j < stop:
            c = wide if j + wide <= stop else 4 if j + 4 <= stop else 1
            s = begin
            while s < end:
                r = min(ROWS, end - s)
                _dot(r, c, x, rows + 8 * s, ldx, w + 4 * j * ldw, ldw, depth, target + 4 * j * ldj, o + 8 * s, ldo, ldj)
                s += r
            j += c
        unit = take(job)


@cfunc(JOB, cache=True)
def add_job(job):  # type: ignore[no-untyped-def]
    """out[row] += sum over j < depth of a[s, j] w[j] for every slot s of the active groups, in their order.

    job: see `pack_add`. A unit is a strip of out's columns, for all groups: no two threads write to the same place.
    """
    a, lda, depth, out, ldo = read(job, 1), read(job, 2), read(job, 3), read(job, 4), read(job, 5)
    rows, offsets, active, first, last = read(job, 6), read(job, 7), read(job, 8), read(job, 9), read(job, 10)
    n_sub, w0, w_expert, w_block, ldw = read(job, 11), read(job, 12), read(job, 13), read(job, 14), read(job, 15)
    width, strip, start = read(job, 16), read(job, 17), read(job, 18)
    unit = take(job)
    while unit * strip < width:
        left, right = unit * strip, min(width, unit * strip + strip)
        for at in range(first, last):
            group = read(active, at)
            begin, end = read(offsets, group), read(offsets, group + 1)
            w = w0 + 4 * (group // n_sub * w_expert + group % n_sub * w_block)
            k = 0
            while k < depth:
                step = min(DEPTH, depth - k)
                s = begin
                while s < end:
                    r = min(ROWS, end - s)
                    source, ids, c = a + 4 * ((s - start) * lda + k), rows + 8 * s, left
                    while c < right:
                        v = VECTORS if c + VECTORS * LANES <= right else 1
                        _add(r, v, source, lda, w + 4 * (k * ldw + c), ldw, step, out + 4 * c, ids, ldo)
                        c += v * LANES
                    s += r
                k += step
        unit = take(job)


@njit(nogil=True, cache=True)
def group(index: Ints, keep: Flags, experts: int) -> tuple[Ints, Ints, Ints, Ints, bool]:
    """(rows, choices, offsets, active, distinct) of the kept slots of index [T, k], keep [T, k, N], sorted by sub-expert, then token.

    rows [S] and choices [S]: token, and token * k + choice, of a slot; offsets [E N + 1]; active: groups that have a slot;
    distinct: no token has one expert twice.
    """
    tokens, k, n_sub = keep.shape
    offsets = np.zeros(experts * n_sub + 1, np.int64)
    distinct = True
    for t in range(tokens):
        for c in range(k):
            for n in range(n_sub):
                if keep[t, c, n]:
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
