"""Register tiles of matrix products, written as LLVM vector code for numba: what the jobs in `block_jobs.py` are made of.

The matrix libraries pack a weight matrix before they multiply it. With the few rows per sub-expert of decoding and short prompts, packing
costs more than the product (docs/developer/log.md has the figures). These tiles read the weights where they are, once, and keep a
tile of the result in registers. Every result is added up in one fixed order, whatever the shape of the tile that it fell into, so a
token's output does not depend on the other tokens of the batch.

Addresses are bytes, strides are elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .target import TARGET
from .vector_code import F32, I32, I64, SIZES, Code, constant

LANES = TARGET.lanes
"""float32 values of a vector register."""

# A tile keeps a sum for each of its results in a register, and needs registers for what it multiplies: 24 sums of 32 registers or 12 of
# 16 leave enough. One sum more would go to memory and back at every step. A multiplication takes four cycles and waits for the sum that
# it adds to, and two begin in a cycle: a core is busy with eight sums or more. So a tile of few rows has more columns.
ROWS = 6
"""Rows of a tile at most."""
MANY = 6 if TARGET.registers == 32 else 3
"""Rows of the tiles of a group that does not fit one."""
DEPTH = 16
"""Rows of w that an add tile goes through before it moves on along them: they are then in the cache for the group's next rows."""
LINE = 64  # bytes of a cache line
NARROW = 4  # columns of a dot tile where not enough are left for more
WIDE = min(8, LANES)
COLUMNS = (WIDE, WIDE, 4, 4, 4, 4) if TARGET.registers == 32 else (WIDE, 4, 4, 2, 2, 2)
"""Columns of a dot tile, by its rows less one."""
VECTORS = (8, 4, 4, 4, 4, 4) if TARGET.registers == 32 else (8, 4, 4, 2, 2, 2)
"""Vectors of an add tile, by its rows less one."""


class DotValues(NamedTuple):
    """The arguments of `dot` as LLVM values."""

    x: Any
    ids: Any
    ldx: Any
    w: Any
    ldw: Any
    depth: Any
    out: Any
    o: Any
    ldo: Any
    ldj: Any


class AddValues(NamedTuple):
    """The arguments of `add` as LLVM values."""

    a: Any
    lda: Any
    w: Any
    ldw: Any
    depth: Any
    out: Any
    ids: Any
    ldo: Any


def _products(c: Code, inputs: list[Any], weights: list[Any], acc: list[Any]) -> list[Any]:
    """Every sum with its input times its weight added. weights: their addresses.

    Weights come one after the other, each for all rows: a register for every row and one for a weight are all that the sums leave.
    """
    result, columns = list(acc), len(weights)
    for j, address in enumerate(weights):
        loaded = c.weights(address)
        for r, value in enumerate(inputs):
            result[r * columns + j] = c.fma(value, loaded, acc[r * columns + j])
    return result


def _dot_tile(c: Code, rows: int, columns: int, fetch: int, given: DotValues) -> None:
    """The tile of `dot`: a register for every sum, over the lanes of which is added up at the end.

    Both operands are read along their rows, so a register holds LANES partial sums of one result. Lane i has always added up the elements
    i, i + LANES, ...: that order, and the tree in `Code.sums`, are the same for every shape of tile.
    """
    xs = c.rows(given.x, given.ids, given.ldx, rows)
    ws = [c.weight_at(given.w, j, given.ldw) for j in range(columns)]

    vectors = max(
        1, LINE // (c.lanes * c.size)
    )  # of a cache line: the steps that share one bring in a line of another column each

    def step(i: Any, acc: list[Any]) -> list[Any]:
        offset = c.b.mul(i, constant(c.lanes))
        if fetch:
            other = c.b.and_(i, constant(vectors - 1))
            ahead = c.weight_at(c.weight_at(constant(0), offset), c.b.add(other, constant(columns)), given.ldw)
            for w in ws[::vectors]:
                c.prefetch(c.b.add(w, ahead))
        inputs = [c.load(c.at(address, offset)) for address in xs]
        return _products(c, inputs, [c.weight_at(address, offset) for address in ws], acc)

    acc = c.loop(c.b.udiv(given.depth, constant(c.lanes)), [c.zero] * (rows * columns), step)
    for r, address in enumerate(c.rows(given.out, given.o, given.ldo, rows)):
        sums = c.sums(acc[r * columns : (r + 1) * columns])
        for j in range(columns):
            c.store(c.b.extract_element(sums, ir.Constant(I32, j)), c.at(address, j, given.ldj))


def _add_tile(c: Code, rows: int, vectors: int, fetch: int, given: AddValues) -> None:
    """The tile of `add`: a register for every LANES columns of the output rows.

    A lane is one element of the output here, so nothing is added across lanes. What `out` holds already is the start of the sum: a row
    that several groups add to is added up in the order of the groups.
    """
    outs = c.rows(given.out, given.ids, given.ldo, rows)
    factors = [c.at(given.a, i, given.lda) for i in range(rows)]

    lines = max(1, LINE // (c.lanes * c.size))

    def step(k: Any, acc: list[Any]) -> list[Any]:
        row = c.weight_at(given.w, k, given.ldw)
        inputs = [c.spread(c.load(c.at(address, k), F32)) for address in factors]
        places = [c.weight_at(row, c.lanes * v) for v in range(vectors)]
        for place in places[::lines] if fetch else ():
            c.prefetch(c.weight_at(place, DEPTH, given.ldw))
        return _products(c, inputs, places, acc)

    start = [c.load(c.at(address, c.lanes * v)) for address in outs for v in range(vectors)]
    acc = c.loop(given.depth, start, step)
    for r, address in enumerate(outs):
        for v in range(vectors):
            c.store(acc[r * vectors + v], c.at(address, c.lanes * v))


def _cases(
    tile: Callable[..., None], shapes: list[tuple[int, int, int]], named: type[DotValues] | type[AddValues], like: Any
) -> tuple[Any, Any]:
    """What numba wants to hear about a function of (rows, columns, *arguments, like) that runs the tile of that shape.

    The size of a tile decides how many registers it has, so it must be known when the code is made. One version of each shape is made,
    and the shape asked for is looked up by comparing: a few predictable jumps for some hundred multiplications.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        rows, columns, fetch, *rest, _ = values
        done = builder.append_basic_block("shape_done")
        number = builder.add(builder.mul(builder.add(builder.mul(rows, constant(16)), columns), constant(2)), fetch)
        table = builder.switch(number, done)
        for r, c, f in shapes:
            with builder.goto_block(builder.append_basic_block("shape")):
                table.add_case(constant((16 * r + c) * 2 + f), builder.block)
                tile(Code(builder, LANES, SIZES[like], fused=TARGET.fused), r, c, f, named(*rest))
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(*[types.intp] * (len(named._fields) + 3), like), codegen


DOT_SHAPES = [
    (r, c, f) for r in range(1, ROWS + 1) for c in sorted({1, min(NARROW, COLUMNS[r - 1]), COLUMNS[r - 1]}) for f in (0, 1)
]
ADD_SHAPES = [(r, v, f) for r in range(1, ROWS + 1) for v in (1, VECTORS[r - 1]) for f in (0, 1)]

# `dot` and `add` keep more than six parameters: numba hands an intrinsic its arguments one by one, and finds the types of the LLVM values
# in its signature. They are what a matrix product of any library takes: addresses, strides, sizes.


@intrinsic
def dot(
    context: Any,
    rows: Any,
    columns: Any,
    fetch: Any,
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
    like: Any,
) -> Any:
    """out[o[i], j ldj] = sum over k < depth of x[ids[i], k] w[j, k], i < rows, j < columns, one of DOT_SHAPES; depth % LANES == 0.

    like: np.float32(0), or np.uint16(0) for bfloat16 weights.
    """
    return _cases(_dot_tile, DOT_SHAPES, DotValues, like)


@intrinsic
def add(
    context: Any,
    rows: Any,
    vectors: Any,
    fetch: Any,
    a: Any,
    lda: Any,
    w: Any,
    ldw: Any,
    depth: Any,
    out: Any,
    ids: Any,
    ldo: Any,
    like: Any,
) -> Any:
    """out[ids[i], :] += sum over k < depth of a[i, k] w[k, :], i < rows, over vectors * LANES columns, one of ADD_SHAPES; depth >= 1.

    like: as in `dot`.
    """
    return _cases(_add_tile, ADD_SHAPES, AddValues, like)


@intrinsic
def size_of(context: Any, like: Any) -> Any:
    """Bytes of a weight."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return constant(SIZES[like])

    return types.intp(like), codegen


@intrinsic
def read(context: Any, address: Any, i: Any) -> Any:
    """The i-th int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        code = Code(builder, LANES)
        return code.number(code.at(values[0], values[1], size=8))

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def take(context: Any, address: Any) -> Any:
    """The int64 at an address, which is one more afterwards: how threads share out work."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], I64.as_pointer())
        # "monotonic": the number alone has to be right. What is read after taking it was made visible otherwise, by starting the threads
        # or through a pipe, so taking does not have to order other memory.
        return builder.atomic_rmw("add", pointer, constant(1), "monotonic")

    return types.intp(types.intp), codegen
