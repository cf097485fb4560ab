"""The two jobs of `jobs.py` over bfloat16 weights: they are widened in registers, half as many bytes are read.

The sums are those of the float32 jobs over the same weights widened beforehand, bit by bit. Rows, results and strides of the rows are
float32, strides of weights are elements. Not part of `jobs.py` so that nobody compiles what he does not use.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cfunc
from numba.extending import intrinsic

from .jobs import CHUNK, DEPTH, JOB
from .tiles import ADD_SHAPES, DOT_SHAPES, FEW, I64, LANES, NARROW, ROWS, VECTOR, VECTORS, WIDE, read, take
from .tiles import _add_tile as add_tile
from .tiles import _cases as cases
from .tiles import _Code as Code
from .tiles import _dot_tile as dot_tile

SHORTS, INTS = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(ir.IntType(32), LANES)


class Half(Code):
    """Weights are the upper halves of float32 numbers."""

    def weight_at(self, address: Any, elements: Any = 0, stride: Any = None) -> Any:
        count = ir.Constant(I64, elements) if isinstance(elements, int) else elements
        if stride is not None:
            count = self.b.mul(count, stride)
        return self.b.add(address, self.b.mul(count, ir.Constant(I64, 2)))

    def weight(self, address: Any) -> Any:
        short = self.b.load(self.b.inttoptr(address, SHORTS.as_pointer()))
        short.align = 2
        shift = ir.Constant(INTS, [16] * LANES)
        return self.b.bitcast(self.b.shl(self.b.zext(short, INTS), shift), VECTOR)


@intrinsic
def dot(
    context: Any, rows: Any, columns: Any, x: Any, ids: Any, ldx: Any, w: Any, ldw: Any, depth: Any, out: Any, o: Any, ldo: Any, ldj: Any
) -> Any:  # fmt: skip
    """As `tiles.dot`."""
    return cases(dot_tile, DOT_SHAPES, 10, Half)


@intrinsic
def add(
    context: Any, rows: Any, vectors: Any, a: Any, lda: Any, w: Any, ldw: Any, depth: Any, out: Any, ids: Any, ldo: Any
) -> Any:
    """As `tiles.add`."""
    return cases(add_tile, ADD_SHAPES, 8, Half)


@cfunc(JOB, cache=True)
def dot_job(job: int) -> None:
    """As `jobs.dot_job`."""
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
        w = read(part, 0) + 2 * (group // n_sub * read(part, 1) + group % n_sub * read(part, 2))
        target = out + 4 * read(part, 4)
        j = unit % chunks * CHUNK
        stop = min(columns, j + CHUNK)
        wide = WIDE if end - begin <= FEW else NARROW
        while j < stop:
            c = wide if j + wide <= stop else NARROW if j + NARROW <= stop else 1
            s = begin
            while s < end:
                r = min(ROWS, end - s)
                dot(r, c, x, rows + 8 * s, ldx, w + 2 * j * ldw, ldw, depth, target + 4 * j * ldj, o + 8 * s, ldo, ldj)
                s += r
            j += c
        unit = take(job)


@cfunc(JOB, cache=True)
def add_job(job: int) -> None:
    """As `jobs.add_job`."""
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
            w = w0 + 2 * (group // n_sub * w_expert + group % n_sub * w_block)
            k = 0
            while k < depth:
                step = min(DEPTH, depth - k)
                s = begin
                while s < end:
                    r = min(ROWS, end - s)
                    source, ids, c = a + 4 * ((s - start) * lda + k), rows + 8 * s, left
                    while c < right:
                        v = VECTORS if c + VECTORS * LANES <= right else 1
                        add(r, v, source, lda, w + 2 * (k * ldw + c), ldw, step, out + 4 * c, ids, ldo)
                        c += v * LANES
                    s += r
                k += step
        unit = take(job)
