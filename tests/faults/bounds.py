"""Bounds-checked twins of everything compiled: a plug-in for pytest, run with NUMBA_BOUNDSCHECK=1 and a cache of its own.

Arrays are then checked by numba at every access. Jobs that are handed addresses are checked here, against the tensors those come from,
before they run. In the end every compiled function of the package must have run in some suite, or its name stands in ELSEWHERE.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moe_prism

ELSEWHERE = {
    "moe_prism.store.aio_reader": "asks the kernel to read; its tables are those of workers.py where there is no io_submit",
}
"""Modules whose functions a machine may not be able to run, and why."""


def install() -> None:
    """Put the twins in the place of what they check."""
    assert os.environ.get("NUMBA_BOUNDSCHECK") == "1" and os.environ.get("NUMBA_CACHE_DIR"), (
        "a cache holds functions without checks"
    )
    from moe_prism.elastic.execute import batch_products, decode_products, tiled
    from moe_prism.elastic.scorers import ridge
    from moe_prism.kernels import row_products

    dot, add, dots, adds, table_of = (
        batch_products.dot,
        batch_products.add,
        row_products.dots,
        row_products.adds,
        decode_products.table_of,
    )
    known: dict[int, Any] = {}

    def checked_dot(x: Any, groups: Any, span: Any, wanted: Any, out: Any, target: Any) -> None:
        check_groups(groups, span, len(x))
        assert x.stride(1) == 1 and out.stride(1) == 1 and len(target) >= span.end - span.begin
        assert not len(target) or 0 <= int(target.min()) <= int(target[: span.end - span.begin].max()) < len(out)
        for p in wanted.parts:
            last = (groups.n_sub - 1) * wanted.block + p.start + (wanted.each - 1) * p.jump
            check_matrix(p.matrix, groups, span, x.shape[1], last)
            assert p.column >= 0 and p.column + (wanted.each - 1) * p.step < out.shape[1]
        dot(x, groups, span, wanted, out, target)

    def checked_add(a: Any, groups: Any, span: Any, down: Any, out: Any) -> None:
        check_groups(groups, span, len(out))
        assert a.stride(1) == 1 and out.stride(1) == 1 and len(a) >= span.end - span.begin
        check_matrix(down, groups, span, out.shape[1], groups.n_sub * a.shape[1] - 1)
        add(a, groups, span, down, out)

    def noted_table(parts: Any) -> Any:
        table = table_of(parts)
        known[table.ctypes.data] = table, parts
        return table

    def checked_dots(x: Any, row: Any, expert: Any, last: int, table: Any, columns: int, order: Any, out: Any, like: Any) -> None:
        _, parts = known[table.ctypes.data]
        check_rows(x, row, out, order, len(row))
        for p in parts:
            assert last < p.matrix.tensor.shape[0] and x.shape[1] <= p.matrix.tensor.shape[2]
            assert (
                p.start + (columns - 1) * p.jump < p.matrix.tensor.shape[1] and p.column + (columns - 1) * p.step < out.shape[1]
            )
        dots(x, row, expert, last, table, columns, order, out, like)

    def checked_adds(a: Any, factor: Any, expert: Any, table: Any, order: Any, out: Any, like: Any) -> None:
        tensor = known[table.ctypes.data][1][0].matrix.tensor
        check_rows(a, order[: len(a)], out, order, len(a))
        assert len(factor) >= len(a) and (not len(a) or 0 <= expert.min() <= expert.max() < tensor.shape[0])
        assert a.shape[1] <= tensor.shape[1] and out.shape[1] == tensor.shape[2]
        adds(a, factor, expert, table, order, out, like)

    batch_products.dot, batch_products.add, row_products.dots, row_products.adds = (
        checked_dot,
        checked_add,
        checked_dots,
        checked_adds,
    )
    decode_products.dots, decode_products.adds, decode_products.table_of = checked_dots, checked_adds, noted_table
    for module in (tiled, ridge):
        for name, twin in (("dot", checked_dot), ("add", checked_add)):
            if hasattr(module, name):
                setattr(module, name, twin)


def install_planes() -> None:
    """The same for products from planes."""
    from moe_prism.elastic.execute import from_planes
    from moe_prism.store import plane_arena

    outputs, values_of, arena_init = plane_arena.plane_outputs, from_planes._values, plane_arena.PlaneArena.__init__
    arenas: dict[int, Any] = {}

    def noted_arena(self: Any, *arguments: Any) -> None:
        arena_init(self, *arguments)
        arenas[self._address] = self

    def checked_outputs(x: Any, slots: Any, which: Any, memory: Any, form: Any, out: Any) -> None:
        arena, blocks = arenas[memory.address], slots.block.repeat(slots.end - [0, *slots.end[:-1]])
        layout, counts = arena.layout, (len(slots.row), len(slots.weight), len(slots.bits))
        assert memory.size == layout.bytes and x.shape[1] == out.shape[1] == layout.hidden and x.strides[1] == 4
        assert set(counts) == {len(blocks)} and 0 <= which.min() <= which.max() < min(len(blocks), len(out))
        assert 0 <= slots.row[which].min() <= slots.row[which].max() < len(x)
        assert 0 < slots.bits[which].min() <= slots.bits[which].max() <= 8
        assert blocks.min() >= 0 and blocks.max() < len(memory.places)
        wide = which[slots.bits[which] > 4]
        for used in (memory.places[blocks[which], 0], memory.places[blocks[wide], 1]):
            assert not len(used) or 0 <= used.min() <= used.max() < len(arena.memory)
        outputs(x, slots, which, memory, form, out)

    def checked_values(planes: Any, bits: int, of: Any, groups: Any, span: Any) -> Any:
        whole, scales = of.inputs
        active = groups.active[span.first : span.last]
        assert whole.is_contiguous() and scales.is_contiguous() and len(whole) == len(scales) and of.out.stride(1) == 1
        assert whole.shape[1:] == (planes.inputs // planes.group, 2, planes.group)
        assert not len(active) or int(active.max()) < len(planes.places.upper) == len(planes.places.lower)
        assert len(of.order) >= span.end - span.begin
        return values_of(planes, bits, of, groups, span)

    plane_arena.PlaneArena.__init__ = noted_arena  # type: ignore[method-assign]
    plane_arena.plane_outputs, from_planes._values = checked_outputs, checked_values


def check_groups(groups: Any, span: Any, rows: int) -> None:
    """Slots of a span lie in a batch of so many rows, and groups lie behind each other."""
    mine = groups.row[span.begin : span.end]
    assert 0 <= span.begin <= span.end <= len(groups.row) and 0 <= span.first <= span.last <= len(groups.active)
    assert not len(mine) or 0 <= int(mine.min()) <= int(mine.max()) < rows
    assert bool((groups.offset.diff() >= 0).all()) and int(groups.offset[-1]) == len(groups.row)


def check_matrix(matrix: Any, groups: Any, span: Any, depth: int, last: int) -> None:
    """The address is the tensor's, its last dimension is the product's, and the groups' rows up to `last` are in it."""
    tensor = matrix.tensor
    active = groups.active[span.first : span.last]
    assert (matrix.address, matrix.expert, matrix.row) == (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))
    assert tensor.stride(2) == 1 and depth <= tensor.shape[2] and last < tensor.shape[1]
    assert not len(active) or int(active.max()) // groups.n_sub < tensor.shape[0]


def check_rows(x: Any, row: Any, out: Any, order: Any, count: int) -> None:
    """Rows that are read and written are there."""
    assert count <= len(order) and count <= len(out)
    if count:  # nothing of an empty array is touched, and its strides are nothing
        assert x.strides[-1] == x.itemsize and out.strides[-1] == out.itemsize
        assert 0 <= row.min() <= row.max() < len(x)


def compiled_functions() -> Iterator[tuple[str, Any]]:
    """(name, function) of every numba function of the package that runs as itself."""
    from numba.core.registry import CPUDispatcher

    seen = set[int]()
    for info in pkgutil.walk_packages(moe_prism.__path__, "moe_prism."):
        if info.name.startswith(("moe_prism.serve.vllm", "moe_prism.__main__")):
            continue  # its own engine's memory; tests/vllm compares every result with the reference
        for name, value in vars(importlib.import_module(info.name)).items():
            if isinstance(value, CPUDispatcher) and value.targetoptions.get("inline") != "always" and id(value) not in seen:
                seen.add(id(value))
                yield f"{value.py_func.__module__}.{name}", value


def pytest_configure(config: Any) -> None:
    install()
    install_planes()


def ran(functions: dict[str, Any]) -> set[str]:
    """Names of those that were called, or that something which was called calls: numba takes a caller from its cache with all it calls."""
    from numba.core.ccallback import CFunc

    names = {id(f.py_func): name for name, f in functions.items()}
    roots = [f.py_func for f in functions.values() if f.overloads]
    for module in {sys.modules[f.py_func.__module__] for f in functions.values()}:
        roots += [value._pyfunc for value in vars(module).values() if isinstance(value, CFunc)]
    found, seen = set[str](), set[int]()
    while roots:
        function = roots.pop()
        if id(function) not in seen:
            seen.add(id(function))
            if id(function) in names:
                found.add(names[id(function)])
            called = (function.__globals__.get(name) for name in function.__code__.co_names)
            roots += [f.py_func for f in called if hasattr(f, "py_func")]
    return found


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """Write what has run, and what there is, to the file that BOUNDS_RAN names."""
    functions = dict(compiled_functions())
    every = sorted(name for name in functions if name.rpartition(".")[0] not in ELSEWHERE)
    Path(os.environ["BOUNDS_RAN"]).write_text(json.dumps({"every": every, "ran": sorted(ran(functions))}))
