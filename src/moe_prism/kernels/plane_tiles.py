"""Register tiles of products with weights in planes of four bits, which are never written out: LLVM vector code for numba.

16 outputs lie side by side. A *line* of 64 bytes holds the codes of 8 inputs for them: byte b of an output's four has input b in its lower
half and input 4 + b in its upper one. A tile of outputs is: scales (bfloat16, 16 for each group of g inputs), the lines of the upper plane,
and then, where there are more than four bits, those of the lower plane. So four bits or fewer read what lies first.

Inputs are whole numbers of 16 bits, as two planes of 8: codes and inputs are multiplied and added up as they are, four at a time, which is
exact, and only the sum of a group is widened and scaled. A weight is (code + offset) x scale; the offset times the sum of a group's inputs
comes with the inputs.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .target import AVX2, AVX512, TARGET
from .vector_code import F32, I32, Code, constant

OUTPUTS, LINE = 16, 64
"""Outputs side by side, and bytes of the codes of 8 inputs for them."""
BYTE = ir.IntType(8)


def _has(feature: str) -> bool:
    return f"+{feature}" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


AVAILABLE = TARGET in (AVX2, AVX512)
"""Whether there are instructions that multiply and add bytes."""
FOUR = TARGET is AVX512 and _has("avx512vnni")
"""Whether one instruction does it for four of them."""
LANES = 16 if FOUR else 8
"""Outputs of a vector."""
AHEAD, SHORT = 1024, 64  # bytes, and lines of a tile
ROWS = 4
TILES = (8, 4, 2, 2) if FOUR else (1, 1, 1, 1)
"""Tiles of outputs that go together, by rows less one: a sum and two sums of bytes of each stay in registers."""


class Values(NamedTuple):
    """The arguments of `multiply` behind the shape of the tile, as LLVM values."""

    x: Any
    scales: Any
    ids: Any
    w: Any
    ldw: Any
    groups: Any
    lines: Any
    lower: Any
    mask: Any
    out: Any
    o: Any
    ldo: Any
    adds: Any


class _Tile:
    """The code of one tile: rows x tiles of outputs. both: whether the lower plane is read too."""

    def __init__(self, code: Code, given: Values, rows: int, tiles: int, both: bool) -> None:
        self.c, self.given, self.rows, self.tiles, self.both = code, given, rows, tiles, both
        self.bytes = ir.VectorType(BYTE, 4 * LANES)
        self.four = code.words
        self.masks = [self._spread(code.b.trunc(given.mask, I32)), self._word(0x0F0F0F0F)]
        self.parts = [(t, p) for t in range(tiles) for p in range(OUTPUTS // LANES)]
        row = code.b.mul(constant(16), code.b.mul(given.groups, given.lines))  # bytes of a row of inputs
        self.xs = [code.b.add(given.x, code.b.mul(self._id(given.ids, r), row)) for r in range(rows)]
        self.factors = [
            code.b.add(given.scales, code.b.mul(self._id(given.ids, r), code.b.mul(given.groups, constant(8))))
            for r in range(rows)
        ]

    def write(self) -> None:
        c, b, given = self.c, self.c.b, self.given
        outs = c.rows(given.out, given.o, given.ldo, self.rows)
        places = [c.at(address, OUTPUTS * t + LANES * p) for address in outs for t, p in self.parts]
        adds = b.icmp_signed("!=", given.adds, constant(0))
        start = [b.select(adds, c.load(place), c.zero) for place in places]
        for value, place in zip(c.loop(given.groups, start, self._group), places, strict=True):
            c.store(value, place)

    def _group(self, g: Any, acc: list[Any]) -> list[Any]:
        """Sums with a group of inputs added."""
        c, b, given = self.c, self.c.b, self.given
        none = [ir.Constant(self.four, None)] * (2 * self.rows * len(self.parts))
        first = b.mul(given.groups, constant(2 * OUTPUTS))
        counted = b.mul(b.mul(g, given.lines), constant(LINE))
        read, whole_codes = self.masks
        sums = self._lines(g, b.add(first, counted), whole_codes if self.both else read, none)
        if self.both:
            sums = [b.shl(value, self._word(4)) for value in sums]
            sums = self._lines(g, b.add(given.lower, counted), read, sums)
        result = list(acc)
        for n, (t, p) in enumerate(self.parts):
            scale = self._scale(b.add(self._tile(t), b.mul(g, constant(2 * OUTPUTS))), p)
            for r in range(self.rows):
                at = r * len(self.parts) + n
                whole = b.add(b.shl(sums[2 * at], self._word(8)), sums[2 * at + 1])
                factor, offset = (c.spread(c.load(c.at(c.at(self.factors[r], i), g, constant(2)), F32)) for i in (0, 1))
                value = c.fma(b.sitofp(whole, c.vector), factor, offset)
                result[at] = c.fma(value, scale, result[at])
        return result

    def _lines(self, g: Any, place: Any, mask: Any, sums: list[Any]) -> list[Any]:
        """sums: of upper and lower bytes of the inputs, for each result; place: of the group's first line in a tile; mask: of codes."""
        b, given = self.c.b, self.given
        start = b.mul(b.mul(g, given.lines), constant(16))
        behind = b.mul(given.lines, constant(8))  # from the upper bytes of a group's inputs to the lower ones
        ahead = self._ahead()

        def step(i: Any, values: list[Any]) -> list[Any]:
            result = list(values)
            x = b.add(start, b.mul(i, constant(8)))
            for n, (t, p) in enumerate(self.parts):
                at = b.add(self._tile(t), b.add(place, b.mul(i, constant(LINE))))
                words = self.c.load(b.add(at, constant(4 * LANES * p)), self.four, 4)
                if not p:
                    self.c.prefetch(b.add(at, ahead))
                codes = b.and_(words, mask), b.and_(b.lshr(words, self._word(4)), mask)
                for quad, r, half in product((0, 1), range(self.rows), (0, 1)):
                    to = 2 * (r * len(self.parts) + n) + half
                    address = b.add(self.xs[r], b.add(x, constant(4 * quad)))
                    four = self._spread(self.c.load(b.add(address, behind) if half else address, I32, 4))
                    result[to] = self._dot(result[to], codes[quad], four)
            return result

        return self.c.loop(given.lines, sums, step)

    def _ahead(self) -> Any:
        """Bytes from a line to the one that is brought in meanwhile: further along the tile, or of the next tiles where these are short."""
        b, given = self.c.b, self.given
        short = b.icmp_signed("<", b.mul(given.groups, given.lines), constant(SHORT))
        return b.select(short, b.mul(given.ldw, constant(self.tiles)), constant(AHEAD))

    def _dot(self, total: Any, codes: Any, four: Any) -> Any:
        """total + codes x inputs, four bytes of each lane added up; codes have no sign."""
        b, module, words = self.c.b, self.c.b.module, self.four
        if FOUR:
            kind = ir.FunctionType(words, [words] * 3)
            return b.call(cgutils.get_or_insert_function(module, kind, "llvm.x86.avx512.vpdpbusd.512"), [total, codes, four])
        halves, octets = ir.VectorType(ir.IntType(16), 2 * LANES), self.bytes
        two = cgutils.get_or_insert_function(module, ir.FunctionType(halves, [octets] * 2), "llvm.x86.avx2.pmadd.ub.sw")
        pairs = b.call(two, [b.bitcast(codes, octets), b.bitcast(four, octets)])
        one = cgutils.get_or_insert_function(module, ir.FunctionType(words, [halves] * 2), "llvm.x86.avx2.pmadd.wd")
        return b.add(total, b.call(one, [pairs, ir.Constant(halves, [1] * (2 * LANES))]))

    def _scale(self, address: Any, part: int) -> Any:
        b, c = self.c.b, self.c
        halves = c.load(b.add(address, constant(2 * LANES * part)), c.halves, 2)
        return b.bitcast(b.shl(b.zext(halves, c.words), self._word(16)), c.vector)

    def _tile(self, number: int) -> Any:
        return self.c.b.add(self.given.w, self.c.b.mul(constant(number), self.given.ldw))

    def _id(self, ids: Any, number: int) -> Any:
        return self.c.number(self.c.at(ids, number, size=8))

    def _spread(self, word: Any) -> Any:
        first = self.c.b.insert_element(ir.Constant(self.four, ir.Undefined), word, ir.Constant(I32, 0))
        return self.c.b.shuffle_vector(first, first, ir.Constant(self.four, None))

    def _word(self, value: int) -> ir.Constant:
        return ir.Constant(self.four, [value] * LANES)


# `multiply` keeps more than six parameters for the reason that `tiles.dot` does: numba hands an intrinsic its arguments one by one.


@intrinsic
def multiply(
    context: Any,
    both: Any,
    rows: Any,
    tiles: Any,
    x: Any,
    scales: Any,
    ids: Any,
    w: Any,
    ldw: Any,
    groups: Any,
    lines: Any,
    lower: Any,
    mask: Any,
    out: Any,
    o: Any,
    ldo: Any,
    adds: Any,
) -> Any:
    """out[o[i], 0 : 16 tiles] = or, if `adds`, += inputs of row ids[i] x weights, i < rows, rows <= ROWS, tiles 1 or TILES[rows - 1].

    x, scales: rows of `plane_jobs.in_bytes`. w: the first of the tiles, `ldw` bytes apart, of `groups` groups of `lines` lines. lower:
    bytes from a tile's begin to its lower plane, read if `both` is 1. mask: bits that count in every four of the last plane read.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given, rest = values[:3], Values(*values[3:])
        shapes = [(b, r, t) for b in (0, 1) for r in range(1, ROWS + 1) for t in sorted({1, TILES[r - 1]})]
        for case in shapes:
            same = [builder.icmp_signed("==", value, constant(wanted)) for value, wanted in zip(given, case, strict=True)]
            with builder.if_then(builder.and_(builder.and_(same[0], same[1]), same[2])):
                _Tile(Code(builder, LANES, fused=TARGET.fused), rest, case[1], case[2], bool(case[0])).write()
        return context.get_dummy_value()

    return types.void(*[types.intp] * 16), codegen
