"""The few LLVM instructions that compiled tiles are made of, over vectors of float32 values.

Addresses are bytes, strides are elements. Weights are float32, or bfloat16 that is widened in registers: the sums are then those over the
same weights widened beforehand, bit by bit, and half as many bytes are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

I64, F32, I32 = ir.IntType(64), ir.FloatType(), ir.IntType(32)
BYTES = 4  # of a float32

ROUNDS = 12582912.0  # 1.5 x 2^23: a float32 of this size has no binary places, and its last bits count
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440054690583e-4
EXPONENT = 87.0  # of e: beyond it, a float32 would overflow, or lose bits
TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)  # off by 5e-9 of e^r up to |r| = ln(2) / 2

SIZES = {types.float32: 4, types.uint16: 2}
"""Bytes of a weight, per numba type that stands for it: uint16 for bfloat16."""


def constant(value: int) -> ir.Constant:
    """An int64 known when the code is written."""
    return ir.Constant(I64, value)


class Code:
    """Writes instructions over vectors of `lanes` values. size: bytes of a weight, 4 (float32) or 2 (bfloat16).

    fused: whether the processor multiplies and adds in one instruction. One that cannot would call a function for every element.
    """

    def __init__(self, builder: Any, lanes: int, size: int = BYTES, *, fused: bool = True) -> None:
        self.b, self.lanes, self.size = builder, lanes, size
        self.vector, self.words, self.halves = (ir.VectorType(kind, lanes) for kind in (F32, I32, ir.IntType(16)))
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        self._fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{lanes}f32") if fused else None

    @property
    def zero(self) -> Any:
        return ir.Constant(self.vector, None)

    def at(self, address: Any, elements: Any = 0, stride: Any = None, size: int = BYTES) -> Any:
        """address + elements * stride * size."""
        count = constant(elements) if isinstance(elements, int) else elements
        if stride is not None:
            count = self.b.mul(count, stride)
        return self.b.add(address, self.b.mul(count, constant(size)))

    def load(self, address: Any, kind: Any = None, align: int = BYTES) -> Any:
        value = self.b.load(self.b.inttoptr(address, (kind or self.vector).as_pointer()))
        value.align = align
        return value

    def number(self, address: Any) -> Any:
        """The int64 at an address."""
        return self.load(address, I64, 8)

    def weight_at(self, address: Any, elements: Any = 0, stride: Any = None) -> Any:
        """`at` among weights."""
        return self.at(address, elements, stride, self.size)

    def weights(self, address: Any) -> Any:
        """A vector of weights, as float32: a bfloat16 is the upper half of one."""
        if self.size == BYTES:
            return self.load(address)
        words = self.b.zext(self.load(address, self.halves, self.size), self.words)
        return self.b.bitcast(self.b.shl(words, ir.Constant(self.words, [16] * self.lanes)), self.vector)

    def prefetch(self, address: Any) -> None:
        """Have the cache line at an address brought into the second cache. Any address will do."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        self.b.call(function, [self.b.inttoptr(address, byte), *(ir.Constant(I32, value) for value in (0, 2, 1))])

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = BYTES

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.b.fadd(self.b.fmul(a, b), c) if self._fma is None else self.b.call(self._fma, [a, b, c])

    def every(self, value: float) -> Any:
        """A number in every lane."""
        return ir.Constant(self.vector, [float(np.float32(value))] * self.lanes)

    def exp(self, value: Any) -> Any:
        """e to the power of each lane, of exponents within +-EXPONENT; the same bits for any number of lanes. NaN stays NaN.

        e^v = 2^n e^r with n the whole number nearest to v / ln 2, in two steps of which the first loses nothing; e^r by its series.
        """
        b = self.b
        for limit, order in ((EXPONENT, ">"), (-EXPONENT, "<")):
            value = b.select(b.fcmp_ordered(order, value, self.every(limit)), self.every(limit), value)
        shifted = self.fma(value, self.every(LOG2_E), self.every(ROUNDS))
        whole = b.fsub(shifted, self.every(ROUNDS))
        rest = self.fma(whole, self.every(-LN2_LOW), self.fma(whole, self.every(-LN2_HIGH), value))
        series = self.every(TAYLOR[0])
        for factor in TAYLOR[1:]:
            series = self.fma(series, rest, self.every(factor))
        bits = b.bitcast(series, self.words)
        power = b.shl(b.bitcast(shifted, self.words), ir.Constant(self.words, [23] * self.lanes))
        return b.bitcast(b.add(bits, power), self.vector)

    def spread(self, scalar: Any) -> Any:
        """A scalar in every lane."""
        first = self.b.insert_element(ir.Constant(self.vector, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, first, ir.Constant(self.words, None))

    def neighbours(self, a: Any, b: Any) -> Any:
        """Sums of neighbouring lanes of a, then of b."""
        lanes = 2 * a.type.count if a is not b else a.type.count

        def pick(first: int) -> Any:
            mask = ir.Constant(ir.VectorType(I32, lanes // 2), list(range(first, lanes, 2)))
            return self.b.shuffle_vector(a, b, mask)

        return self.b.fadd(pick(0), pick(1))

    def sums(self, vectors: list[Any]) -> Any:
        """One vector of the sums over the lanes of each of `vectors` (a power of two of them)."""
        count = len(vectors)
        while len(vectors) > 1:
            vectors = [self.neighbours(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        (v,) = vectors
        while v.type.count > count:
            v = self.neighbours(v, v)
        return v

    def rows(self, base: Any, ids: Any, stride: Any, count: int) -> list[Any]:
        """Addresses of the float32 rows that are named by int64 ids in memory."""
        return [self.at(base, self.number(self.at(ids, i, size=8)), stride) for i in range(count)]

    def loop(self, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """values = body(i, values) for i in 0..count-1, count >= 1."""
        entry, block, done = self.b.block, self.b.append_basic_block("loop"), self.b.append_basic_block("done")
        self.b.branch(block)
        self.b.position_at_end(block)
        i = self.b.phi(I64)
        i.add_incoming(constant(0), entry)
        values = []
        for value in start:
            values.append(self.b.phi(value.type))
            values[-1].add_incoming(value, entry)
        result = body(i, values)
        following = self.b.add(i, constant(1))
        i.add_incoming(following, self.b.block)
        for phi, value in zip(values, result, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, count), block, done)
        self.b.position_at_end(done)
        return result
