"""Register tiles of matrix products, written as LLVM vector code for numba: what the jobs in `jobs.py` are made of.

The matrix libraries pack a weight matrix before they multiply it. With the few rows per sub-expert of decoding and short prompts, packing
costs more than the product (docs/log.md has the figures). These tiles read the weights where they are, once, and keep a tile of the result
in registers. Every result is added up in one fixed order, whatever the shape of the tile that it fell into, so a token's output
does not depend on the other tokens of the batch.

Addresses are bytes, strides are float32 elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

_features = get_host_cpu_features()
if _features.get("avx512f"):
    LANES, ROWS = 16, 6
elif _features.get("avx2"):
    LANES, ROWS = 8, 3  # half as many registers
else:
    LANES, ROWS = 4, 6
"""float32 values of a vector register, and rows of a tile."""

PAYS = bool(_features.get("avx512f"))
"""Whether the tiles are used: only where they were run. The narrower ones are written, but no such processor was at hand."""

I64, F32 = ir.IntType(64), ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)
BYTES = 4


def _constant(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


class _Code:
    """The few instructions a tile needs."""

    def __init__(self, builder: Any) -> None:
        self.b = builder
        self._fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{VECTOR.count}f32"
        )

    def at(self, address: Any, elements: Any = 0, stride: Any = None) -> Any:
        """address + elements * stride * 4."""
        count = _constant(elements) if isinstance(elements, int) else elements
        if stride is not None:
            count = self.b.mul(count, stride)
        return self.b.add(address, self.b.mul(count, _constant(BYTES)))

    def load(self, address: Any, kind: Any = VECTOR) -> Any:
        value = self.b.load(self.b.inttoptr(address, kind.as_pointer()))
        value.align = 8 if kind is I64 else BYTES
        return value

    def weight_at(self, address: Any, elements: Any = 0, stride: Any = None) -> Any:
        """`at` among weights."""
        return self.at(address, elements, stride)

    def weight(self, address: Any) -> Any:
        """A vector of weights, as float32."""
        return self.load(address)

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer())).align = BYTES

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.b.call(self._fma, [a, b, c])

    def spread(self, scalar: Any) -> Any:
        """A scalar in every lane."""
        first = self.b.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
        return self.b.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), VECTOR.count), None))

    def neighbours(self, a: Any, b: Any) -> Any:
        """Sums of neighbouring lanes of a, then of b."""
        lanes = 2 * a.type.count if a is not b else a.type.count

        def pick(first: int) -> Any:
            mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes // 2), list(range(first, lanes, 2)))
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
        """Addresses of the rows that are named by int64 ids in memory."""
        return [self.at(base, self.load(self.b.add(ids, _constant(8 * i)), I64), stride) for i in range(count)]

    def loop(self, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """values = body(i, values) for i in 0..count-1, count >= 1."""
        entry, block, done = self.b.block, self.b.append_basic_block("loop"), self.b.append_basic_block("done")
        self.b.branch(block)
        self.b.position_at_end(block)
        i = self.b.phi(I64)
        i.add_incoming(_constant(0), entry)
        values = []
        for value in start:
            values.append(self.b.phi(value.type))
            values[-1].add_incoming(value, entry)
        result = body(i, values)
        following = self.b.add(i, _constant(1))
        i.add_incoming(following, self.b.block)
        for phi, value in zip(values, result, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, count), block, done)
        self.b.position_at_end(done)
        return result


def _dot_tile(
    c: _Code,
    rows: int,
    columns: int,
    x: Any,
    ids: Any,
    ldx: Any,
    w: Any,
    ldw: Any,
    depth: Any,
    out: Any,
    o: Any,
    ldo: Any,
    ldj: Any,
) -> None:
    """The tile of `dot`: a register for every sum, over the lanes of which is added up at the end."""
    xs = c.rows(x, ids, ldx, rows)
    ws = [c.weight_at(w, j, ldw) for j in range(columns)]

    def step(i: Any, acc: list[Any]) -> list[Any]:
        offset = c.b.mul(i, _constant(LANES))
        loaded = [c.weight(c.weight_at(address, offset)) for address in ws]
        result = []
        for r, address in enumerate(xs):
            value = c.load(c.at(address, offset))
            result += [c.fma(value, loaded[j], acc[r * columns + j]) for j in range(columns)]
        return result

    acc = c.loop(c.b.udiv(depth, _constant(LANES)), [ir.Constant(VECTOR, None)] * (rows * columns), step)
    for r, address in enumerate(c.rows(out, o, ldo, rows)):
        sums = c.sums(acc[r * columns : (r + 1) * columns])
        for j in range(columns):
            c.store(c.b.extract_element(sums, ir.Constant(ir.IntType(32), j)), c.at(address, j, ldj))


def _add_tile(
    c: _Code, rows: int, vectors: int, a: Any, lda: Any, w: Any, ldw: Any, depth: Any, out: Any, ids: Any, ldo: Any
) -> None:
    """The tile of `add`: a register for every LANES columns of the output rows."""
    outs = c.rows(out, ids, ldo, rows)
    factors = [c.at(a, i, lda) for i in range(rows)]

    def step(k: Any, acc: list[Any]) -> list[Any]:
        row = c.weight_at(w, k, ldw)
        loaded = [c.weight(c.weight_at(row, LANES * v)) for v in range(vectors)]
        result = []
        for r, address in enumerate(factors):
            factor = c.spread(c.load(c.at(address, k), F32))
            result += [c.fma(factor, loaded[v], acc[r * vectors + v]) for v in range(vectors)]
        return result

    start = [c.load(c.at(address, LANES * v)) for address in outs for v in range(vectors)]
    acc = c.loop(depth, start, step)
    for r, address in enumerate(outs):
        for v in range(vectors):
            c.store(acc[r * vectors + v], c.at(address, LANES * v))


def _cases(
    tile: Callable[..., None], shapes: list[tuple[int, int]], arguments: int, code: type[_Code] = _Code
) -> tuple[Any, Any]:
    """What numba wants to hear about a function of (rows, columns, *arguments) that runs the tile of that shape."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        rows, columns, *rest = values
        for r, c in shapes:
            same = [builder.icmp_signed("==", value, _constant(wanted)) for value, wanted in ((rows, r), (columns, c))]
            with builder.if_then(builder.and_(*same)):
                tile(code(builder), r, c, *rest)
        return context.get_dummy_value()

    return types.void(*[types.intp] * (arguments + 2)), codegen


WIDE = min(8, LANES)  # columns of a dot tile of few rows
FEW = 2  # rows of it
NARROW = 4  # columns of the others
VECTORS = 4 if ROWS == 6 else 2  # of an add tile
DOT_SHAPES = [(r, c) for r in range(1, ROWS + 1) for c in sorted({1, NARROW} | ({WIDE} if r <= FEW else set()))]
ADD_SHAPES = [(r, v) for r in range(1, ROWS + 1) for v in (1, VECTORS)]


@intrinsic
def dot(
    context: Any,
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
    ldj: Any,
) -> Any:
    """out[o[i], j ldj] = sum over k < depth of x[ids[i], k] w[j, k], i < rows, j < columns, one of DOT_SHAPES; depth % LANES == 0."""
    return _cases(_dot_tile, DOT_SHAPES, 10)


@intrinsic
def add(
    context: Any, rows: Any, vectors: Any, a: Any, lda: Any, w: Any, ldw: Any, depth: Any, out: Any, ids: Any, ldo: Any
) -> Any:
    """out[ids[i], :] += sum over k < depth of a[i, k] w[k, :], i < rows, over vectors * LANES columns, one of ADD_SHAPES; depth >= 1."""
    return _cases(_add_tile, ADD_SHAPES, 8)


@intrinsic
def read(context: Any, address: Any, i: Any) -> Any:
    """The i-th int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code = _Code(builder)
        return code.load(builder.add(values[0], builder.mul(values[1], _constant(8))), I64)

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def take(context: Any, address: Any) -> Any:
    """The int64 at an address, which is one more afterwards: how threads share out work."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, _constant(1), "monotonic")

    return types.intp(types.intp), codegen
