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
    """The cutoff of a budget : linear between those of evenly spaced budgets from 0 to 1; 0 at budget 1."""
    steps = len(cutoffs) - 1
    position = min(max(budget, np.float32(0)), np.float32(1)) * np.float32(steps)
    low = int(position)
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
def select(candidates: Choosing, budgets: Floats, keeps: Flags, values: Floats) -> None:
    """keeps [B, T, k, N] of a choice at each of budgets [B, T], and the slots' values [T, k, N]."""
    index, experts = candidates.chosen, len(candidates.norms.weight)
    clamped, valid = np.empty_like(index), np.empty(index.shape, np.bool_)
    for t in range(index.shape[0]):
        for c in range(index.shape[1]):
            clamped[t, c] = min(max(index[t, c], 0), experts - 1)
            valid[t, c] = clamped[t, c] == index[t, c]
    predicted_norms(candidates.norms, clamped, values)
    slot_values(candidates.weight, values, valid, values)
    for b in range(len(budgets)):
        if len(candidates.cutoffs):
            mark_above(values, candidates.cutoffs, budgets[b], valid, keeps[b])
        else:
            mark_largest(values, budgets[b], valid, keeps[b])
