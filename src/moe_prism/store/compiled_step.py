"""A layer's step from an arena in compiled calls: what is kept, who leaves, and the outputs; reads are begun and awaited between them.

With a few tokens a layer's work takes microseconds, and a call from Python as long. What each part gives is what it gives alone, to the
last bit: `kernels.whole_layer.choose`, `wanted.sort_entries`, `fast_pool.serve`, `kernels.row_products`, `wanted.add_rows`.
Shapes: T tokens, k experts per token, N parts per expert, S entries (token, part), G parts that are wanted, d hidden, m neurons of a part.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from ..kernels.activation import silu_times
from ..kernels.addresses import flags, floats, floats_3d, numbers, pointer
from ..kernels.row_products import adds, dots
from ..kernels.selection import add_dropped
from ..kernels.whole_layer import CHOICE, WEIGHTS, choose
from .fast_pool import AskedKeys, Residency, SlotTable, serve
from .table_worth import PoolOrder
from .wanted import add_rows, sort_entries

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

DONE, BEGUN, TOO_MANY, REFUSED = range(4)
"""What became of a step: it is computed; its records have places, and some may have to be read; it wants more than fits, and nothing was
asked for; there was no room for all of it, though it should fit."""


class ArenaTables(NamedTuple):
    """Where the weights lie that compute. first, down: `decode_products.table_of` of the arena's matrices; slots: of the arena."""

    first: Ints
    down: Ints
    slots: int
    order: Ints  # 0, 1, ..., as many as there can be entries
    places: SlotTable
    like: Any  # `decode_products.like_of` the weights


class StepLayer(NamedTuple):
    """A layer: its number, first key, experts E, parts N, d, m, and the slots of its pool."""

    number: int
    base: int
    experts: int
    parts: int
    hidden: int
    block: int
    capacity: int


class Cache(NamedTuple):
    """Who is in the layer's pool, who leaves, and which keys are still on their way [keys]."""

    residency: Residency
    order: PoolOrder
    pending: Flags


class Entries(NamedTuple):
    """The fields of `Wanted` but its importance; late [S]: entries whose record is on its way."""

    keys: Ints
    begin: Ints
    end: Ints
    row: Ints
    weight: Floats
    late: Flags


class StepRows(NamedTuple):
    """What a step is given, arrays by address.

    x [T, d]; chosen, weight [T, k]: experts and their weights; tokens, k: T and k; choice: a CHOICE, 0 = everything is kept, with its
    past and its budget, the dials [T]; keep [T, k, N] and out [T, d] are written. step: its number; held: slots that reads under way hold;
    pauses: whether the caller has something to do before the layer computes.
    """

    x: int
    chosen: int
    weight: int
    tokens: int
    k: int
    choice: int
    past: int
    budget: int
    keep: int
    out: int
    step: int
    held: int
    pauses: bool


@njit(nogil=True, cache=True)
def kept(layer: StepLayer, rows: StepRows, keep: Flags) -> None:
    """keep [T, k, N] of a step."""
    index = numbers(rows.chosen, rows.tokens, rows.k)
    if rows.choice == 0:
        for t in range(rows.tokens):
            for c in range(rows.k):
                keep[t, c, :] = 0 <= index[t, c] < layer.experts
        return
    choice = carray(pointer(rows.choice), 1, CHOICE)[0]
    weights = carray(pointer(choice.weights), 1, WEIGHTS)[0]
    x, weight = floats(rows.x, rows.tokens, layer.hidden), floats(rows.weight, rows.tokens, rows.k)
    choose(weights, choice, rows.past, x, index, weight, floats(rows.budget, 1, rows.tokens)[0], keep)


@njit(nogil=True, cache=True)
def begin_step(layer: StepLayer, cache: Cache, rows: StepRows, arena: ArenaTables) -> tuple[int, Entries, Ints, Floats]:
    """(what became of it, the entries, keys to read ascending, importance [G]); out is complete where it is DONE.

    After BEGUN the caller reads into the places that were given out, calls `compute` for what is there, and `finish` when all has come.
    """
    keep = flags(rows.keep, rows.tokens, rows.k, layer.parts)
    kept(layer, rows, keep)
    index, weight = numbers(rows.chosen, rows.tokens, rows.k), floats(rows.weight, rows.tokens, rows.k)
    keys, begin, end, row, chosen, importance = sort_entries(index, weight, keep, layer.experts, layer.base)
    late = np.zeros(len(row), np.bool_)
    entries, loads = Entries(keys, begin, end, row, chosen, late), np.empty(0, np.int64)
    if len(keys) + rows.held > layer.capacity:
        return TOO_MANY, entries, loads, importance
    first = np.argsort(-importance, kind="mergesort")
    asked = AskedKeys(keys[first], importance[first].astype(np.float64), rows.step, layer.number, False)
    loads, _, refused = serve(asked, cache.residency, arena.places, cache.order)
    if len(refused):
        return REFUSED, entries, loads, importance
    loads = np.sort(loads)
    some, i = rows.pauses, 0
    for g in range(len(keys)):
        is_late = cache.pending[keys[g]]
        if i < len(loads) and loads[i] == keys[g]:
            is_late, i = True, i + 1
        if is_late:
            late[begin[g] : end[g]] = True
            some = True
    if some:
        return BEGUN, entries, loads, importance
    parts = np.empty((len(row), layer.hidden), np.float32)
    compute(layer, arena, rows, entries, False, parts)
    end_step(layer, rows, entries, parts)
    return DONE, entries, loads, importance


@njit(nogil=True, cache=True)
def compute(layer: StepLayer, arena: ArenaTables, rows: StepRows, entries: Entries, late: bool, parts: Floats) -> None:
    """parts [S, d]: weight x output of the entries that are late, or of those that are not."""
    count = 0
    for s in range(len(entries.late)):
        count += entries.late[s] == late
    if count == 0:
        return
    row, slot, at = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    factor, i = np.empty(count, np.float32), 0
    for g in range(len(entries.keys)):
        for s in range(entries.begin[g], entries.end[g]):
            if entries.late[s] == late:
                row[i], slot[i], factor[i], at[i] = entries.row[s], arena.places.of[entries.keys[g]], entries.weight[s], s
                i += 1
    m = layer.block
    x = floats(rows.x, rows.tokens, layer.hidden)
    pre, a = np.empty((count, 2 * m), np.float32), np.empty((count, m), np.float32)
    dots(x, row, slot, arena.slots - 1, arena.first, m, arena.order, pre, arena.like)
    for s in range(count):
        gate = pre.ctypes.data + 8 * s * m
        silu_times(gate, gate + 4 * m, m, np.float32(1), a.ctypes.data + 4 * s * m)
    if count == len(parts):
        adds(a, factor, slot, arena.down, arena.order, parts, arena.like)
    else:
        found = np.empty((count, layer.hidden), np.float32)
        adds(a, factor, slot, arena.down, arena.order, found, arena.like)
        for s in range(count):
            parts[at[s]] = found[s]
    pre[0, 0] = a[0, 0]  # alive until here: above only their addresses are used


@njit(nogil=True, cache=True)
def end_step(layer: StepLayer, rows: StepRows, entries: Entries, parts: Floats) -> None:
    """out [T, d] = the entries' outputs added up in order, and what makes up for slots that are not kept."""
    out = floats(rows.out, rows.tokens, layer.hidden)
    out[:] = 0
    add_rows(parts, entries.row, out)
    if rows.choice == 0:
        return
    choice = carray(pointer(rows.choice), 1, CHOICE)[0]
    if choice.vectors:
        index, weight = numbers(rows.chosen, rows.tokens, rows.k), floats(rows.weight, rows.tokens, rows.k)
        keep, extra = flags(rows.keep, rows.tokens, rows.k, layer.parts), np.zeros_like(out)
        add_dropped(index, weight, keep, floats_3d(choice.vectors, layer.experts, layer.parts, layer.hidden), extra)
        out += extra


@njit(nogil=True, cache=True)
def finish(layer: StepLayer, arena: ArenaTables, rows: StepRows, entries: Entries, parts: Floats) -> None:
    """What was late, and the end of the step."""
    compute(layer, arena, rows, entries, True, parts)
    end_step(layer, rows, entries, parts)
