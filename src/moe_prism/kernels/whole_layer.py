"""A layer with few tokens in one call: from the choice of slots through the products to what makes up for dropped ones.

With few tokens a layer's products take microseconds, and a dozen small tensor operations take ten times as long. What each part computes is
what it computes alone, to the last bit: `selection.py`, `block_jobs.py`, `activation.py`. Shapes as in `elastic/base.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from .activation import silu_times
from .addresses import call, flags, floats, floats_3d, fork, numbers, pointer
from .block_jobs import group
from .selection import Held, Norms, add_dropped, mark_above, mark_held, mark_largest, predicted_norms, slot_values

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

ALIGN = 64  # columns: strips of an output row end on a cache line

WEIGHTS = np.dtype(
    [(name, np.int64) for name in ("hidden", "experts", "n_sub", "block")]
    + [(name, np.int64) for name in ("first", "down", "down_expert", "down_row", "fork", "worth", "dot_job", "add_job")],
    align=True,
)
"""A layer's weights. first: address of gate and up as parts [2, 6] of `block_jobs.dot_units`; down: address and strides of [E, f, d];
fork: address of GOMP_parallel, for products of `worth` multiplications or more; dot_job, add_job: of the jobs over weights of this type."""

CHOICE = np.dtype(
    [
        (name, np.int64)
        for name in ("weights", "dot_job", "gates", "predictor", "predictor_row", "first", "scale", "cutoffs", "levels")
    ]
    + [(name, np.int64) for name in ("vectors", "tables", "layer", "mine", "strict")]
    + [("part", np.float64), ("ceiling", np.float64)],
    align=True,
)
"""How a layer's slots are chosen: addresses of its WEIGHTS and of the float32 dot job, r, addresses of the ridge [E, N, predictor_row],
of the gate neurons' parts [2 r, 6] as `block_jobs.dot_units` has them, of their scale [E, N r], of `levels` cutoffs (none for the K
largest), of the compensation's vectors [E, N, d] (0: none). tables, layer, mine, strict, part (its `weight`): of `selection.Held`, where
a budget is held."""

PAST = np.dtype([(name, np.int64) for name in ("rows", "tokens", "sums", "seen", "places", "layers")], align=True)
"""Where `selection.Held` finds the requests of a forward: rows [3, tokens], sums [places, layers, 2], seen [places, 2]."""

Rows = tuple[int, int, int, int, int]
"""Addresses of x [T, d], index and weight [T, k]; T and k."""
Record = Any
"""One of these, read from memory."""


@njit(nogil=True, cache=True)
def has_twice(index: Ints, experts: int) -> bool:
    """Whether a token of index [T, k] has an expert twice: the slots of a group would share a row."""
    for t in range(index.shape[0]):
        for c in range(index.shape[1]):
            for other in range(c):
                if index[t, c] == index[t, other] and 0 <= index[t, c] < experts:
                    return True
    return False


@njit(nogil=True, cache=True)
def dot_all(
    function: int, x: Floats, slots: tuple[Ints, Ints, Ints], order: Ints, shape: tuple[int, int], parts: Ints, out: Floats
) -> Ints:
    """The job of `block_jobs.dot_units` for all slots, run by one thread unless function is 0. shape: n_sub, columns of every part.

    slots: row, offset, active of `block_jobs.group`; order: the row of out of every slot; parts [P, 6].
    """
    rows, offsets, active = slots
    job = np.empty(15 + 6 * len(parts), np.int64)
    job[0], job[1], job[2], job[3] = 0, x.ctypes.data, x.shape[1], x.shape[1]
    job[4], job[5], job[6], job[7] = out.ctypes.data, out.shape[1], rows.ctypes.data, order.ctypes.data
    job[8], job[9], job[10], job[11] = offsets.ctypes.data, active.ctypes.data, 0, len(active)
    job[12], job[13], job[14] = shape[0], shape[1], len(parts)
    for p in range(len(parts)):
        for i in range(6):
            job[15 + 6 * p + i] = parts[p, i]
    if function != 0:
        call(function, job.ctypes.data)
    return job


@njit(nogil=True, cache=True)
def job_of_add(weights: Record, slots: tuple[Ints, Ints, Ints], a: Floats, out: Floats, strip: int) -> Ints:
    """What `block_jobs.add_units` reads."""
    rows, offsets, active = slots
    job = np.empty(19, np.int64)
    job[0], job[1], job[2], job[3] = 0, a.ctypes.data, a.shape[1], a.shape[1]
    job[4], job[5], job[6], job[7] = out.ctypes.data, out.shape[1], rows.ctypes.data, offsets.ctypes.data
    job[8], job[9], job[10], job[11] = active.ctypes.data, 0, len(active), weights.n_sub
    job[12], job[13] = weights.down, weights.down_expert
    job[14], job[15] = a.shape[1] * weights.down_row, weights.down_row
    job[16], job[17], job[18] = out.shape[1], strip, 0
    return job


@njit(nogil=True, cache=True)
def multiply(weights: Record, x: Floats, index: Ints, weight: Floats, keep: Flags, out: Floats, threads: int) -> None:
    """out [T, d] = sum over kept slots keep [T, k, N] of weight x output."""
    out[:] = 0
    rows, choices, offsets, active, _ = group(index, keep, weights.experts)
    slots, m, width = len(rows), weights.block, out.shape[1]
    if slots == 0:
        return
    pre, a = np.empty((slots, 2 * m), np.float32), np.empty((slots, m), np.float32)
    found, order, work = (rows, offsets, active), np.arange(slots), slots * m * x.shape[1]
    alone = threads == 1 or 2 * work < weights.worth
    parts = numbers(weights.first, 2, 6)
    job = dot_all(weights.dot_job if alone else 0, x, found, order, (weights.n_sub, m), parts, pre)
    if not alone:
        fork(weights.fork, weights.dot_job, job.ctypes.data, threads)
    factors = weight.reshape(-1)
    for s in range(slots):
        gate = pre.ctypes.data + 8 * s * m
        silu_times(gate, gate + 4 * m, m, factors[choices[s]], a.ctypes.data + 4 * s * m)
    if threads == 1 or work < weights.worth:
        job = job_of_add(weights, found, a, out, width)
        call(weights.add_job, job.ctypes.data)
    else:
        per = ALIGN * threads
        job = job_of_add(weights, found, a, out, (width + per - 1) // per * ALIGN)
        fork(weights.fork, weights.add_job, job.ctypes.data, threads)
    # the jobs have their addresses only: they must be alive until here
    pre[0, 0] = a[0, 0] + order[0] + rows[0] + choices[0] + offsets[0] + active[0] + job[0]


@njit(nogil=True, cache=True)
def norms_of(weights: Record, choice: Record, x: Floats, index: Ints, out: Floats) -> None:
    """out [T, k, N]: the ridge's norm of every slot of choices index [T, k] that are all experts."""
    n, count, experts = weights.n_sub, index.size, weights.experts
    width = n * choice.gates
    rows, choices, offsets, active, _ = group(index, np.ones((*index.shape, 1), np.bool_), experts)
    linear, gates = np.empty((count, n), np.float32), np.empty((count, width), np.float32)
    found = (rows, offsets, active)
    ridge_part = np.array([[choice.predictor, n * choice.predictor_row, 0, choice.predictor_row, 0, 1]])
    dot_all(choice.dot_job, x, found, choices, (1, n), ridge_part, linear)
    if width:
        pre = np.empty((count, 2 * width), np.float32)
        dot_all(weights.dot_job, x, found, choices, (1, n), numbers(choice.first, 2 * choice.gates, 6), pre)
        for s in range(count):
            at = pre.ctypes.data + 8 * s * width
            silu_times(at, at + 4 * width, width, np.float32(1), gates.ctypes.data + 4 * s * width)
        pre[0, 0] = gates[0, 0]  # alive until here
    scale = floats(choice.scale, experts, width)
    ridge = floats_3d(choice.predictor, experts, n, choice.predictor_row)
    predicted_norms(Norms(linear, gates, scale, ridge, choice.ceiling), index, out)


@njit(nogil=True, cache=True)
def held_by(choice: Record, past: Record) -> Held:
    """The arrays of a budget that is held for all rows of a forward."""
    rows = numbers(past.rows, 3, past.tokens)
    sums, seen = floats_3d(past.sums, past.places, past.layers, 2), floats(past.seen, past.places, 2)
    tables = floats(choice.tables, 2, 129)
    return Held(rows, np.arange(past.tokens), sums, seen, tables, choice.part, choice.layer, choice.mine, choice.strict != 0)


@njit(nogil=True, cache=True)
def choose(
    weights: Record, choice: Record, past: int, x: Floats, index: Ints, weight: Floats, budget: Floats, keep: Flags
) -> None:
    """keep [T, k, N] at the dials budget [T], as `selection.select` has it; past: address of a PAST, 0 where no budget is held."""
    clamped, valid = np.empty_like(index), np.empty(index.shape, np.bool_)
    for t in range(index.shape[0]):
        for c in range(index.shape[1]):
            clamped[t, c] = min(max(index[t, c], 0), weights.experts - 1)
            valid[t, c] = clamped[t, c] == index[t, c]
    values = np.empty(keep.shape, np.float32)
    norms_of(weights, choice, x, clamped, values)
    slot_values(weight, values, valid, values)
    if choice.levels == 0:
        mark_largest(values, budget, valid, keep)
        return
    cutoffs = floats(choice.cutoffs, 1, choice.levels)[0]
    if past == 0:
        mark_above(values, cutoffs, budget, valid, keep)
    else:
        mark_held(values, cutoffs, budget.copy(), valid, held_by(choice, carray(pointer(past), 1, PAST)[0]), keep)


@njit(nogil=True, cache=True)
def chosen(by: int, past: int, budget_at: int, rows: Rows, keep_at: int, out_at: int, threads: int) -> bool:
    """out [T, d] of the slots that are chosen, compensated, and keep [T, k, N] unless it is at 0. As `run_chosen` says."""
    choice = carray(pointer(by), 1, CHOICE)[0]
    weights = carray(pointer(choice.weights), 1, WEIGHTS)[0]
    x_at, index_at, weight_at, tokens, k = rows
    x, index, weight = floats(x_at, tokens, weights.hidden), numbers(index_at, tokens, k), floats(weight_at, tokens, k)
    if has_twice(index, weights.experts):
        return False
    own = np.empty((tokens if keep_at == 0 else 0, k, weights.n_sub), np.bool_)
    keep = own if keep_at == 0 else flags(keep_at, tokens, k, weights.n_sub)
    out = floats(out_at, tokens, weights.hidden)
    choose(weights, choice, past, x, index, weight, floats(budget_at, 1, tokens)[0], keep)
    multiply(weights, x, index, weight, keep, out, threads)
    if choice.vectors:
        extra = np.zeros_like(out)
        add_dropped(index, weight, keep, floats_3d(choice.vectors, weights.experts, weights.n_sub, weights.hidden), extra)
        out += extra
    return True


@njit(nogil=True, cache=True)
def given(of: int, rows: Rows, keep_at: int, out_at: int, threads: int) -> bool:
    """out [T, d] of the slots keep [T, k, N], or, at address 0, of all. As `run_given` says."""
    weights = carray(pointer(of), 1, WEIGHTS)[0]
    x_at, index_at, weight_at, tokens, k = rows
    x, index, weight = floats(x_at, tokens, weights.hidden), numbers(index_at, tokens, k), floats(weight_at, tokens, k)
    if has_twice(index, weights.experts):
        return False
    out = floats(out_at, tokens, weights.hidden)
    own = np.empty((tokens if keep_at == 0 else 0, k, weights.n_sub), np.bool_)
    keep = own if keep_at == 0 else flags(keep_at, tokens, k, weights.n_sub)
    for t in range(len(own)):
        for c in range(k):
            own[t, c] = 0 <= index[t, c] < weights.experts
    multiply(weights, x, index, weight, keep, out, threads)
    return True


# These take numbers one by one: anything else costs a call from Python more than all of them.
@njit(nogil=True, cache=True)
def run_chosen(
    by: int, past: int, budget: int, x: int, index: int, weight: int, tokens: int, k: int, keep: int, out: int, threads: int
) -> bool:
    """`chosen`, by addresses of a CHOICE, a PAST (0: no budget is held) and the arrays.

    False, and nothing done, where a token has an expert twice: slots of a group would share a row.
    """
    return chosen(by, past, budget, (x, index, weight, tokens, k), keep, out, threads)  # type: ignore[no-any-return]


@njit(nogil=True, cache=True)
def run_given(of: int, x: int, index: int, weight: int, tokens: int, k: int, keep: int, out: int, threads: int) -> bool:
    """`given`, by addresses of a WEIGHTS and the arrays. False as in `run_chosen`."""
    return given(of, (x, index, weight, tokens, k), keep, out, threads)  # type: ignore[no-any-return]
