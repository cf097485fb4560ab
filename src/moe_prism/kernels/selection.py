"""Selection in one pass over the slots of a batch: what a dozen small tensor operations per layer would otherwise do on a CPU.

Shapes as in `base.py`; every function has its tensor form beside its caller, which is what other devices run.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

PRIOR = 4.0
"""Tokens that the calibration's cutoffs count for against a request's own."""
HORIZON, HORIZON_AT_START = 0.0625, 4.0
"""What a request is off by is made up for within this share of the tokens it had, and so many more."""
MOST_MOVED = 3.0
"""Log-odds that a dial is moved by at most."""


class Norms(NamedTuple):
    """What the ridge predictor needs of every choice (S = T k of them) to say how large each block's output is.

    linear [S, N or more]: its part that is linear in the input. gates [S, N r]: activations of the gate neurons. scale [E, N r]: their
    down-projections' norms. weight [E, N, N r + 1 at least]: its last N r + 1 columns are of gates and constant. ceiling: of the exponent.
    """

    linear: Floats
    gates: Floats
    scale: Floats
    weight: Floats
    ceiling: float


class Choosing(NamedTuple):
    """The candidates of a batch and a rule: chosen (ids), weight [T, k] of the router (ids outside [0, E) mean none).

    cutoffs: at evenly spaced budgets, for `mark_above`; none of them for `mark_largest`.
    """

    norms: Norms
    chosen: Ints
    weight: Floats
    cutoffs: Floats


class Held(NamedTuple):
    """What one layer needs to hold a budget for the requests of a batch of T rows (`elastic.control` explains it).

    rows [3, T]: slot of the state before a row (-1: none), slot of that after it (-1: nowhere), number of the group that is held (0:
    none). own [S]: which of the rows the candidates are. sums [slots, L, 2], tokens [slots, 2]: the state. tables [2, 129]: what every
    position of the dial asks for, as a share of the layer's slots, and of the layers up to it as a share of all slots. weight: the
    layer's part in the bytes of all slots. layer: its number. mine: the group's number.
    """

    rows: Ints
    own: Ints
    sums: Floats
    tokens: Floats
    tables: Floats
    weight: float
    layer: int
    mine: int
    strict: bool


@njit(nogil=True, cache=True)
def predicted_norms(norms: Norms, index: Ints, out: Floats) -> None:
    """out [T, k, N] = exp(linear + weight's tail . [sqrt(|gates| scale), 1]) for every choice index [T, k]."""
    linear, gates, scale, weight, ceiling = norms.linear, norms.gates, norms.scale, norms.weight, norms.ceiling
    tokens, k, n_sub = out.shape
    features, last = gates.shape[1], weight.shape[2] - 1
    energy = np.empty(features, np.float32)
    for t in range(tokens):
        for c in range(k):
            expert, row = index[t, c], t * k + c
            for g in range(features):
                energy[g] = np.sqrt(np.abs(gates[row, g]) * scale[expert, g])
            for n in range(n_sub):
                total = linear[row, n] + weight[expert, n, last]
                for g in range(features):
                    total += energy[g] * weight[expert, n, last - features + g]
                out[t, c, n] = np.exp(min(total, np.float32(ceiling)))


@njit(nogil=True, cache=True)
def slot_values(weight: Floats, norms: Floats, valid: Flags, out: Floats) -> None:
    """out [T, k, N]: |routing weight| x norm, -1 where there is no expert."""
    tokens, k, n_sub = norms.shape
    for t in range(tokens):
        for c in range(k):
            for n in range(n_sub):
                out[t, c, n] = np.abs(weight[t, c]) * norms[t, c, n] if valid[t, c] else np.float32(-1)


@njit(nogil=True, cache=True)
def mark_largest(values: Floats, budget: Floats, valid: Flags, keep: Flags) -> None:
    """keep [T, k, N]: the K largest values of a token, equal ones in order; K = budget x valid slots, rounded half to even, >= 1."""
    tokens, k, n_sub = values.shape
    flat, marks = values.reshape(tokens, k * n_sub), keep.reshape(tokens, k * n_sub)
    for t in range(tokens):
        total = valid[t].sum() * n_sub
        count = min(total, max(1, int(np.rint(budget[t] * np.float32(total)))))
        for i in range(k * n_sub):
            value, rank = flat[t, i], 0
            for j in range(i):
                rank += flat[t, j] >= value
            for j in range(i + 1, k * n_sub):
                rank += flat[t, j] > value
            marks[t, i] = rank < count


@njit(nogil=True, cache=True)
def cutoff_of(cutoffs: Floats, budget: np.float32) -> np.float32:
    """The cutoff of a budget: linear between those of evenly spaced budgets from 0 to 1; 0 at budget 1."""
    steps = len(cutoffs) - 1
    position = min(max(budget, np.float32(0)), np.float32(1)) * np.float32(steps)
    low = min(max(int(position), 0), steps)  # what is not a number would be a place far outside
    cutoff = cutoffs[low] + (position - np.float32(low)) * (cutoffs[min(low + 1, steps)] - cutoffs[low])
    return np.float32(0) if budget >= 1 else np.float32(cutoff)


@njit(nogil=True, cache=True)
def mark_above(values: Floats, cutoffs: Floats, budget: Floats, valid: Flags, keep: Flags) -> None:
    """keep [T, k, N] = valid slots whose value reaches the cutoff of the token's budget [T], and every token's first largest one.

    cutoffs: at evenly spaced budgets from 0 to 1, linear in between; every valid slot at budget 1.
    """
    tokens, k, n_sub = values.shape
    for t in range(tokens):
        cutoff = cutoff_of(cutoffs, budget[t])
        best, at = np.float32(-np.inf), 0
        for c in range(k):
            for n in range(n_sub):
                keep[t, c, n] = valid[t, c] and values[t, c, n] >= cutoff
                if values[t, c, n] > best:
                    best, at = values[t, c, n], c * n_sub + n
        keep[t, at // n_sub, at % n_sub] = valid[t, at // n_sub]


@njit(nogil=True, cache=True)
def mark_widths(values: Floats, cutoffs: Floats, budget: Floats, valid: Flags, steps: Floats, out: Floats) -> None:
    """out [T, k, N]: the bits of the last of the steps [W, 2] = (bits, multiple of the cutoff) that a slot's value reaches, 0 for none.

    cutoffs: as in `mark_above`. A token's first largest slot has the bits of the first step at least.
    """
    tokens, k, n_sub = values.shape
    for t in range(tokens):
        cutoff, best, at = cutoff_of(cutoffs, budget[t]), np.float32(-np.inf), 0
        for c in range(k):
            for n in range(n_sub):
                value, out[t, c, n] = values[t, c, n], np.float32(0)
                for w in range(len(steps)):
                    if valid[t, c] and value >= cutoff * steps[w, 1]:
                        out[t, c, n] = steps[w, 0]
                if value > best:
                    best, at = value, c * n_sub + n
        if valid[t, at // n_sub] and out[t, at // n_sub, at % n_sub] == 0:
            out[t, at // n_sub, at % n_sub] = steps[0, 0]


@njit(nogil=True, cache=True)
def at_position(table: Floats, position: float) -> float:
    """A table at evenly spaced positions from 0 to 1, linear in between."""
    steps = len(table) - 1
    place = min(max(position, 0.0), 1.0) * steps
    low = min(max(int(place), 0), steps)  # what is not a number would be a place far outside
    return float(table[low]) + (place - low) * (float(table[min(low + 1, steps)]) - float(table[low]))


@njit(nogil=True, cache=True)
def carry(rows: Ints, sums: Floats, tokens: Floats) -> None:
    """State of every row as its request had it before this forward. A layer that holds a row overwrites it; `Held` has the shapes."""
    for r in range(rows.shape[1]):
        before, after = rows[0, r], rows[1, r]
        if after < 0:
            continue
        for layer in range(sums.shape[1]):
            for j in range(2):
                sums[after, layer, j] = sums[before, layer, j] if before >= 0 else np.float32(0)
        tokens[after, 0] = (tokens[before, 0] if before >= 0 else np.float32(0)) + np.float32(rows[2, r] > 0)
        tokens[after, 1] = 0


class CacheColumns(NamedTuple):
    """What is known of B requests beside a cache of C columns: real [B, C], whether a column holds a token that counts; last [B], column
    of the last one, -1: none; sums, tokens: states of all columns, row after row, as `Held` has them.
    """

    real: Flags
    last: Ints
    sums: Floats
    tokens: Floats


@njit(nogil=True, cache=True)
def follow(columns: CacheColumns, length: int, kinds: Ints, mask: Ints, positions: Ints, rows: Ints) -> None:
    """rows [3, B T] as `Held` has them, of the next columns behind `length`, their states begun, and the columns noted as they are.

    kinds [B T]; mask [B, >= T]: 0 where a token does not count; positions [B or 1, T]: 0 where a request begins; either may be empty.
    """
    real, last, sums, seen = columns.real, columns.last, columns.sums, columns.tokens
    count, wide = real.shape
    tokens = len(kinds) // count
    for b in range(count):
        for t in range(tokens):
            r, at = b * tokens + t, length + t
            counts = mask.size == 0 or mask[b, mask.shape[1] - tokens + t] != 0
            starts = positions.size > 0 and positions[b % len(positions), t] == 0
            rows[0, r] = -1 if starts or last[b] < 0 else b * wide + last[b]
            rows[1, r] = b * wide + at if counts else -1
            rows[2, r] = kinds[r]
            real[b, at] = counts
            if counts:
                last[b] = at
    carry(rows, sums, seen)


@njit(nogil=True, cache=True)
def mark_most(values: Floats, cutoff: float, most: int, valid: Flags, keep: Flags) -> int:
    """keep [k, N] of one token: valid slots that reach the cutoff, the first largest one, and of those the `most` largest. How many."""
    k, n_sub = values.shape
    best, at, count = np.float32(-np.inf), 0, 0
    for c in range(k):
        for n in range(n_sub):
            keep[c, n] = valid[c] and values[c, n] >= cutoff
            count += keep[c, n]
            if values[c, n] > best:
                best, at = values[c, n], c * n_sub + n
    if not keep[at // n_sub, at % n_sub] and valid[at // n_sub]:
        keep[at // n_sub, at % n_sub] = True
        count += 1
    if count <= most:
        return count
    flat = values.copy().reshape(-1)
    marks = keep.copy().reshape(-1)
    for i in range(k * n_sub):
        rank = 0
        for j in range(k * n_sub):
            rank += marks[j] and (flat[j] > flat[i] or (flat[j] == flat[i] and j < i))
        keep[i // n_sub, i % n_sub] = marks[i] and rank < most
    return most


@njit(nogil=True, cache=True)
def mark_held(values: Floats, cutoffs: Floats, dial: Floats, valid: Flags, held: Held, keep: Flags) -> None:
    """keep [S, k, N] as `mark_above` at the dials that hold, request by request, those asked for, dial [S], and are left there."""
    tokens, k, n_sub = values.shape
    rows, sums, seen, layer = held.rows, held.sums, held.tokens, held.layer
    i = 0
    for r in range(rows.shape[1]):
        before, after = rows[0, r], rows[1, r]
        here = i < tokens and held.own[i] == r
        total = 0
        if here:
            total = valid[i].sum() * n_sub
        if not here or rows[2, r] != held.mine or dial[i] >= 1 or total == 0:
            if here:
                cutoff = 0.0 if dial[i] >= 1 else at_position(cutoffs, dial[i])
                mark_most(values[i], cutoff, k * n_sub, valid[i], keep[i])
                i += 1
            if after >= 0 and before >= 0 and rows[2, r] in (0, held.mine):
                for j in range(2):
                    sums[after, layer, j] = sums[before, layer, j]
            continue
        total_off, learned, count, lower = 0.0, 0.0, 0.0, 0.0
        if before >= 0:
            total_off, learned = float(sums[before, layer, 0]), float(sums[before, layer, 1])
            count = float(seen[before, 0])
        if after >= 0:
            lower = float(seen[after, 1])
        share, asked = at_position(held.tables[0], dial[i]), at_position(held.tables[1], dial[i])
        moved = learned - total_off / (HORIZON * count + HORIZON_AT_START)
        moved = min(max(moved, -MOST_MOVED), MOST_MOVED)
        odds = float(dial[i]) / (1.0 - float(dial[i])) * np.exp(moved)
        reached = np.float32(odds / (1.0 + odds))
        most = k * n_sub
        if held.strict:
            most = max(1, int((share - lower / held.weight) * total + 1e-4))
        kept = mark_most(values[i], at_position(cutoffs, float(reached)), most, valid[i], keep[i])
        if after >= 0:
            more = lower + held.weight * (kept / total - share)
            sums[after, layer, 0] = total_off + more / asked
            sums[after, layer, 1] = min(max(learned - more / (asked * (count + PRIOR)), -MOST_MOVED), MOST_MOVED)
            seen[after, 1] = more
        dial[i] = reached
        i += 1


@njit(nogil=True, cache=True, fastmath={"contract"})
def add_dropped(index: Ints, weight: Floats, keep: Flags, vectors: Floats, out: Floats) -> None:
    """out[t] += routing weight x vector of every slot that is not kept, in their order. vectors [E, N, d], ids outside [0, E) mean none."""
    tokens, k, n_sub = keep.shape
    for t in range(tokens):
        for c in range(k):
            expert, factor = index[t, c], weight[t, c]
            if expert < 0 or expert >= len(vectors):
                continue
            for n in range(n_sub):
                if not keep[t, c, n]:
                    for j in range(out.shape[1]):
                        out[t, j] += factor * vectors[expert, n, j]


@njit(nogil=True, cache=True)
def select(candidates: Choosing, held: Held | None, budgets: Floats, keeps: Flags, values: Floats) -> None:
    """keeps [B, T, k, N] of a choice at each of budgets [B, T], and the slots' values [T, k, N].

    Where a budget is held, the first of the budgets is, and the others become what the first has reached where that is less.
    """
    index, experts = candidates.chosen, len(candidates.norms.weight)
    clamped, valid = np.empty_like(index), np.empty(index.shape, np.bool_)
    for t in range(index.shape[0]):
        for c in range(index.shape[1]):
            clamped[t, c] = min(max(index[t, c], 0), experts - 1)
            valid[t, c] = clamped[t, c] == index[t, c]
    predicted_norms(candidates.norms, clamped, values)
    slot_values(candidates.weight, values, valid, values)
    if held is not None:
        mark_held(values, candidates.cutoffs, budgets[0], valid, held, keeps[0])
    for b in range(0 if held is None else 1, len(budgets)):
        if held is not None:
            budgets[b] = np.minimum(budgets[b], budgets[0])
        if len(candidates.cutoffs):
            mark_above(values, candidates.cutoffs, budgets[b], valid, keeps[b])
        else:
            mark_largest(values, budgets[b], valid, keeps[b])
