"""Register tiles of products with weights in the order in which vLLM's CPU kernel keeps them, as LLVM vector code for numba.

That kernel stores a matrix [rows, depth] as [rows / 16, depth, 16]: the 16 values that one input multiplies lie side by side. So a
tile is a chain of `out += x[k] * w[k, 0:16]`, for up-projections and down-projections alike, and nothing is added across lanes.
Every result is added up in one fixed order, whatever the shape of the tile that it fell into, so a token's output does not depend on
the other tokens of the batch.

Addresses are bytes, strides are elements. Inputs and results are float32, weights float32 or bfloat16.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from numba.core import types
from numba.extending import intrinsic

from .target import TARGET
from .vector_code import F32, Code, constant

WIDTH = 16
"""Values that lie side by side."""


class PackedValues(NamedTuple):
    """The arguments of `packed` behind the shape of the tile, as LLVM values."""

    x: Any
    ids: Any
    ldx: Any
    w: Any
    ldw: Any
    depth: Any
    out: Any
    o: Any
    ldo: Any


def _tile(c: Code, rows: int, columns: int, given: PackedValues) -> None:
    """A register for every 16 columns of an output row; on AVX2 the compiler makes two of it."""
    inputs, outputs = c.rows(given.x, given.ids, given.ldx, rows), c.rows(given.out, given.o, given.ldo, rows)
    starts = [c.weight_at(given.w, i, given.ldw) for i in range(columns)]
    places = [c.at(address, WIDTH * i) for address in outputs for i in range(columns)]

    def step(k: Any, acc: list[Any]) -> list[Any]:
        offset = c.b.mul(k, constant(WIDTH * c.size))
        loaded = [c.weights(c.b.add(start, offset)) for start in starts]
        factors = [c.spread(c.load(c.at(address, k), F32)) for address in inputs]
        return [c.fma(f, v, acc[i * columns + j]) for i, f in enumerate(factors) for j, v in enumerate(loaded)]

    for value, place in zip(c.loop(given.depth, [c.load(p) for p in places], step), places, strict=True):
        c.store(value, place)


SIDES = ((6, 4, 2, 1), (4, 2, 1)) if TARGET.lanes == 16 else ((2, 1), (2, 1))
"""Rows and columns of the tiles, largest first. The sums, a weight per column and an input must fit the registers: 24 + 4 + 1 of the 32 of
AVX-512, (4 + 2 + 1) x 2 of the 16 of AVX2. Sides in between would be more code to compile for a few rows at the edge."""

# `packed` keeps more than six parameters for the reason that `tiles.dot` does: numba hands an intrinsic its arguments one by one.


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
            same = [builder.icmp_signed("==", value, constant(wanted)) for value, wanted in zip(given, case, strict=True)]
            with builder.if_then(builder.and_(builder.and_(same[0], same[1]), same[2])):
                _tile(Code(builder, WIDTH, 2 if case[0] else 4, fused=TARGET.fused), case[1], case[2], PackedValues(*rest))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 12), codegen
