"""The default solver: alternating balanced assignment from several starts, then exact swaps and small restarts.

With F the kept mass (swaps.py), fix the partition and the best kept blocks of a token are its A largest; fix those and the best
partition is a balanced assignment. Neither step lowers F, so a few rounds settle; exact swaps then find what both steps miss, and
shaking a few neurons loose and settling again (iterated local search) leaves poor optima. All heavy loops run compiled, lock-free.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..errors import UsageError
from .assign import balance
from .base import Doubles, Flags, Floats, Ints, Partition, check_problem, result
from .greedy import greedy_owner
from .random_ import random_owner
from .swaps import block_sums, polish

ROUNDS = 30  # more than ever needed: 8-15 settle (spec moe-prism 4.4)
TOLERANCE = 1e-7  # of the total mass: float32 cannot tell smaller swaps from rounding
LOOSE = 4  # neurons a shake takes from each of its blocks


def solve(
    mass: Floats, n_sub: int, dropped: int, seed: int = 0, *, starts: int | None = None, shakes: int | None = None
) -> Partition:
    """The best of `starts` settled partitions (greedy, then random), improved by `shakes` restarts around it.

    None: 8 starts and 64 shakes up to 128 neurons, falling to 1 and 0 as experts grow: descents of wide experts end close to each
    other, those of narrow ones do not. Raises as `Solver` says.
    """
    mass = check_problem(mass, n_sub, dropped)
    starts = max(1, min(8, 1024 // mass.shape[1])) if starts is None else starts
    shakes = (min(64, 8192 // mass.shape[1]) if mass.shape[1] <= 1024 else 0) if shakes is None else shakes
    if starts < 1 or shakes < 0:
        raise UsageError(f"starts={starts}, shakes={shakes}", "starts must be at least 1, shakes at least 0")
    mass_t = np.ascontiguousarray(mass.T)
    total = float(mass.sum(dtype=np.float64))
    rng = np.random.default_rng(seed)
    owner, kept = greedy_owner(mass, n_sub), n_sub - dropped
    best = kept_mass(block_sums(mass_t, owner, n_sub), kept)
    trace = [(0.0, total - best)]
    for step in range(starts + shakes):
        if step < starts:
            trial = random_owner(mass.shape[1], n_sub, rng) if step else owner.copy()
            stale = np.ones((n_sub, n_sub), np.bool_)
            norms = alternate(mass_t, trial, n_sub, kept)
        else:
            trial, stale = shake(owner, n_sub, rng)
            norms = block_sums(mass_t, trial, n_sub)
        polish(mass_t, trial, norms, kept, TOLERANCE * total, stale)
        value = kept_mass(norms, kept)
        if value > best:
            owner, best = trial, value
        trace.append((step + 1.0, total - best))
    return result(mass, owner, n_sub, dropped, trace)


def shake(owner: Ints, n_sub: int, rng: np.random.Generator) -> tuple[Ints, Flags]:
    """A copy of owner with a few neurons handed round two or three random blocks, and the pairs of blocks this makes stale."""
    blocks = rng.permutation(n_sub)[: rng.integers(2, 4)]
    # At most half a block: handing round all of it would only rename the blocks.
    count = min(LOOSE, max(1, owner.shape[0] // n_sub // 2))
    out = owner.copy()
    for g, h in zip(blocks, np.roll(blocks, 1), strict=True):
        out[rng.choice(np.flatnonzero(owner == g), count, replace=False)] = h
    stale = np.zeros((n_sub, n_sub), np.bool_)
    stale[blocks] = True
    stale[:, blocks] = True
    return out, stale


def alternate(mass_t: Floats, owner: Ints, n_sub: int, kept: int) -> Floats:
    """Token step and neuron step in turn until F stops growing. Changes owner [f]; returns its norms [N, T]."""
    norms: Floats = block_sums(mass_t, owner, n_sub)
    value = kept_mass(norms, kept)
    for _ in range(ROUNDS):
        after = balance(gains(mass_t, kept_flags(norms, kept)))
        moved = block_sums(mass_t, after, n_sub)
        grown = kept_mass(moved, kept)
        if grown <= value * (1 + TOLERANCE):
            break
        owner[:] = after
        norms, value = moved, grown
    return norms


def kept_mass(norms: Floats, kept: int) -> float:
    """F: the sum over tokens of the `kept` largest norms, accumulated in float64."""
    return float((norms * kept_flags(norms, kept)).sum(dtype=np.float64))


@njit(nogil=True, cache=True)
def kept_flags(norms: Floats, kept: int) -> Floats:
    """1 where a block is among the token's `kept` largest, [N, T]; ties go to the lower block."""
    n_sub, tokens = norms.shape
    flags = np.zeros((n_sub, tokens), np.float32)
    for t in range(tokens):
        for _ in range(kept):
            best = -1
            for n in range(n_sub):
                if flags[n, t] == 0 and (best < 0 or norms[n, t] > norms[best, t]):
                    best = n
            flags[best, t] = 1
    return flags


@njit(nogil=True, cache=True, fastmath=True)
def gains(mass_t: Floats, flags: Floats) -> Doubles:
    """G [f, N]: mass a neuron would have kept in every block, had the tokens kept what `flags` [N, T] says."""
    out = np.empty((mass_t.shape[0], flags.shape[0]))
    for c in range(mass_t.shape[0]):
        row = mass_t[c]
        for n in range(flags.shape[0]):
            flag, total = flags[n], np.float32(0)
            for t in range(row.shape[0]):
                total += row[t] * flag[t]
            out[c, n] = total
    return out
