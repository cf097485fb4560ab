"""Register tiles of products with weights in the order in which vLLM's CPU kernel keeps them, as LLVM vector code for numba.

That kernel stores a matrix [rows, depth] as [rows / 16, depth, 16]: the 16 values that one input multiplies lie side by side. So a
tile is a chain of `out += x[k] * w[k, 0:16]`, for up-projections and down-projections alike, and nothing is added across lanes.
Every result is added up in one fixed order, whatever the shape of the tile that it fell into, so a token's output does not depend on
the other tokens of the batch.

Addresses are bytes, strides are elements. Inputs and results are float32, weights float32 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ...elastic.tiles import LANES

WIDTH = 16
"""Values that lie side by side."""

I16, I64, F32 = ir.IntType(16), ir.IntType(64), ir.FloatType()
VECTOR, WORDS, HALVES = (ir.VectorType(kind, WIDTH) for kind in (F32, ir.IntType(32), I16))


def _number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


class _Code:
    """The instructions of one tile."""

    def __init__(self, builder: Any, *, half: bool) -> None:
        self.b, self.half, self.size = builder, half, 2 if half else 4
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        self.fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{WIDTH}f32")

    def at(self, address: Any, elements: Any, size: int = 4) -> Any:
        return self.b.add(address, self.b.mul(elements, _number(size)))

    def load(self, address: Any, kind: Any = VECTOR, align: int = 4) -> Any:
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def weights(self, address: Any) -> Any:
        """16 weights as float32: a bfloat16 is the upper half of one."""
        if not self.half:
            return self.load(address)
        words = self.b.zext(self.load(address, HALVES, 2), WORDS)
        return self.b.bitcast(self.b.shl(words, ir.Constant(WORDS, [16] * WIDTH)), VECTOR)

    def spread(self, scalar: Any) -> Any:
        first = self.b.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
        return self.b.shuffle_vector(first, first, ir.Constant(WORDS, None))

    def rows(self, base: Any, ids: Any, stride: Any, count: int) -> list[Any]:
        """Addresses of the float32 rows that int64 ids in memory name."""
        return [self.at(base, self.b.mul(self.load(self.b.add(ids, _number(8 * i)), I64, 8), stride)) for i in range(count)]

    def loop(self, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """values = body(i, values) for i in 0..count-1, count >= 1."""
        entry, block, done = self.b.block, self.b.append_basic_block("loop"), self.b.append_basic_block("done")
        self.b.branch(block)
        self.b.position_at_end(block)
        i = self.b.phi(I64)
        i.add_incoming(_number(0), entry)
        values = [self.b.phi(value.type) for value in start]
        for phi, value in zip(values, start, strict=True):
            phi.add_incoming(value, entry)
        result = body(i, values)
        following = self.b.add(i, _number(1))
        i.add_incoming(following, self.b.block)
        for phi, value in zip(values, result, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, count), block, done)
        self.b.position_at_end(done)
        return result


def _tile(
    c: _Code, rows: int, columns: int, x: Any, ids: Any, ldx: Any, w: Any, ldw: Any, depth: Any, out: Any, o: Any, ldo: Any
) -> None:
    """A register for every 16 columns of an output row."""
    inputs, outputs = c.rows(x, ids, ldx, rows), c.rows(out, o, ldo, rows)
    starts = [c.at(w, c.b.mul(ldw, _number(i)), c.size) for i in range(columns)]
    places = [c.b.add(address, _number(4 * WIDTH * i)) for address in outputs for i in range(columns)]

    def step(k: Any, acc: list[Any]) -> list[Any]:
        offset = c.b.mul(k, _number(WIDTH * c.size))
        loaded = [c.weights(c.b.add(start, offset)) for start in starts]
        factors = [c.spread(c.load(c.at(address, k), F32)) for address in inputs]
        return [c.b.call(c.fma, [f, v, acc[i * columns + j]]) for i, f in enumerate(factors) for j, v in enumerate(loaded)]

    for value, place in zip(c.loop(depth, [c.load(p) for p in places], step), places, strict=True):
        c.b.store(value, c.b.inttoptr(place, VECTOR.as_pointer())).align = 4


SIDES = ((6, 4, 2, 1), (4, 2, 1)) if LANES == 16 else ((2, 1), (2, 1))
"""Rows and columns of the tiles, largest first: what the registers hold."""


@intrinsic
def packed(
    context: Any,
    half: Any,
    rows: Any,
    columns: Any,
    x: Any,
    ids: Any,
    ldx: Any,
    w: Any,
    ldw: Any,
    depth: Any,
    out: Any,
    o: Any,
    ldo: Any,
) -> Any:
    """out[o[i], 16 c : 16 c + 16] += sum over k < depth of x[ids[i], k] w[c, k, 0:16], i < rows, c < columns, sides from SIDES.

    depth >= 1; ldw from one c to the next; half: 1 for bfloat16 weights, 0 for float32.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, rest = values[:3], values[3:]
        for case in product((0, 1), *SIDES):
            same = [builder.icmp_signed("==", value, _number(wanted)) for value, wanted in zip(given, case, strict=True)]
            with builder.if_then(builder.and_(builder.and_(same[0], same[1]), same[2])):
                _tile(_Code(builder, half=case[0] == 1), case[1], case[2], *rest)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 12), codegen
