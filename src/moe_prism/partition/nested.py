"""One partition for every budget: charge the K smallest blocks for each K = 1..N-1 and add the charges up (spec moe-prism 4.4).

Minimising that sum is maximising F = sum over tokens and A = 1..N-1 of the A largest block norms, so the largest norm of a token counts
N-1 times, the smallest not at all. The alternation of `alt` stays exact: for a fixed partition every block's count is N less its rank,
for fixed counts the best partition is a balanced assignment. Swaps are priced as in swaps.py, once per A: with u[A] the pair's rival when
A blocks are kept, a swap changes F by the sum over A of max(u[A], l') - max(u[A], l), l the larger norm of the pair.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..errors import UsageError
from .alt import ROUNDS, TOLERANCE, gains, shake
from .assign import balance
from .base import Flags, Floats, Ints, Partition, check_problem, cost, perm_of
from .greedy import greedy_owner
from .random_ import random_owner
from .swaps import PASSES, WIDTH, apply_swap, block_sums


def nested_cost(mass: Floats, perm: Ints, n_sub: int) -> float:
    """Mean over K = 1..N-1 of `cost` with K dropped, from scratch: in the units of that, so that shares of the mass compare."""
    return float(np.mean([cost(mass, perm, n_sub, dropped) for dropped in range(1, n_sub)]))


def solve(
    mass: Floats, n_sub: int, dropped: int, seed: int = 0, *, starts: int | None = None, shakes: int | None = None
) -> Partition:
    """The best of `starts` settled partitions, improved by `shakes` restarts around it; both fall for wide experts, as in `alt`.

    dropped is only checked: every count is charged. The result's cost is `nested_cost`.
    """
    mass = check_problem(mass, n_sub, dropped)
    starts = max(1, min(8, 1024 // mass.shape[1])) if starts is None else starts
    shakes = (min(32, 4096 // mass.shape[1]) if mass.shape[1] <= 1024 else 0) if shakes is None else shakes
    if starts < 1 or shakes < 0:
        raise UsageError(f"starts={starts}, shakes={shakes}", "starts must be at least 1, shakes at least 0")
    mass_t = np.ascontiguousarray(mass.T)
    rng = np.random.default_rng(seed)
    tolerance = TOLERANCE * float(mass.sum(dtype=np.float64))
    owner = greedy_owner(mass, n_sub)
    best = ranked_mass(block_sums(mass_t, owner, n_sub))
    ceiling = (n_sub - 1) * float(mass.sum(dtype=np.float64))
    trace = [(0.0, (ceiling - best) / (n_sub - 1))]
    for step in range(starts + shakes):
        if step < starts:
            trial = random_owner(mass.shape[1], n_sub, rng) if step else owner.copy()
            stale = np.ones((n_sub, n_sub), np.bool_)
            norms = alternate(mass_t, trial, n_sub)
        else:
            trial, stale = shake(owner, n_sub, rng)
            norms = block_sums(mass_t, trial, n_sub)
        polish(mass_t, trial, norms, tolerance, stale)
        value = ranked_mass(norms)
        if value > best:
            owner, best = trial, value
        trace.append((step + 1.0, (ceiling - best) / (n_sub - 1)))
    perm = perm_of(owner, n_sub)
    return Partition(perm, nested_cost(mass, perm, n_sub), tuple(trace))


def alternate(mass_t: Floats, owner: Ints, n_sub: int) -> Floats:
    """Token step and neuron step in turn until F stops growing. Changes owner [f]; returns its norms [N, T]."""
    norms: Floats = block_sums(mass_t, owner, n_sub)
    value = ranked_mass(norms)
    for _ in range(ROUNDS):
        after = balance(gains(mass_t, times_kept(norms)))
        moved = block_sums(mass_t, after, n_sub)
        grown = ranked_mass(moved)
        if grown <= value * (1 + TOLERANCE):
            break
        owner[:] = after
        norms, value = moved, grown
    return norms


def times_kept(norms: Floats) -> Floats:
    """For how many A = 1..N-1 a block is among the token's A largest, [N, T]; ties go to the lower block."""
    order = np.argsort(-norms, axis=0, kind="stable")
    counts = np.empty(norms.shape, np.float32)
    np.put_along_axis(counts, order, np.arange(norms.shape[0] - 1, -1, -1, dtype=np.float32)[:, None], axis=0)
    return counts


def ranked_mass(norms: Floats) -> float:
    """F, accumulated in float64."""
    ranked = np.sort(norms, axis=0).sum(1, dtype=np.float64)
    return float(ranked @ np.arange(norms.shape[0]))


@njit(nogil=True, cache=True, fastmath=True)
def rivals(norms: Floats, g: int, h: int, u: Floats) -> None:
    """u [N-1, T]: row A-1 holds max(a + b - p, q), p and q the (A-1)-th and A-th largest norm of the blocks other than g and h."""
    n_sub, tokens = norms.shape
    top = np.zeros((n_sub - 1, tokens), np.float32)  # the others, falling; one row of zeros stands for "absent"
    for n in range(n_sub):
        if n in (g, h):
            continue
        for t in range(tokens):
            carry = norms[n, t]
            for k in range(n_sub - 1):
                best = top[k, t]
                top[k, t] = max(best, carry)
                carry = min(best, carry)
    a, b = norms[g], norms[h]
    u[0] = top[0]
    for k in range(1, n_sub - 1):
        p, q = top[k - 1], top[k]
        for t in range(tokens):
            u[k, t] = max(a[t] + b[t] - p[t], q[t])


@njit(nogil=True, cache=True, fastmath=True)
def baseline(a: Floats, b: Floats, u: Floats) -> float:
    """What `swap_gain` compares with: sum over tokens and A of max(u[A], a, b)."""
    total = 0.0
    for k in range(u.shape[0]):
        row, part = u[k], np.float32(0)
        for t in range(a.shape[0]):
            part += max(row[t], max(a[t], b[t])) - row[t]
        total += float(part)
    return total


@njit(nogil=True, cache=True, fastmath=True)
def swap_value(a: Floats, b: Floats, u: Floats, out: Floats, into: Floats, larger: Floats) -> float:
    """`baseline` after block g gave neuron `out` [T] to block h for neuron `into` [T]. larger [T] is scratch."""
    for t in range(a.shape[0]):
        x = into[t] - out[t]
        larger[t] = max(a[t] + x, b[t] - x)
    total = 0.0
    for k in range(u.shape[0]):
        row, part = u[k], np.float32(0)
        for t in range(a.shape[0]):
            part += max(larger[t] - row[t], np.float32(0))
        total += float(part)
    return total


@njit(nogil=True, cache=True)
def worth(a: Floats, b: Floats, u: Floats, mass_t: Floats, members: Ints) -> Floats:
    """First-order worth of each member to block g over block h: its mass times how often only g is kept, less only h. [members]."""
    sign = np.zeros(a.shape[0], np.float32)
    for k in range(u.shape[0]):
        for t in range(a.shape[0]):
            if max(a[t], b[t]) > u[k, t]:
                sign[t] += 1 if a[t] >= b[t] else -1
    out = np.empty(members.shape[0], np.float32)
    for i in range(members.shape[0]):
        out[i] = np.sum(mass_t[members[i]] * sign)
    return out


@njit(nogil=True, cache=True)
def improve_pair(mass_t: Floats, owner: Ints, norms: Floats, pair: tuple[int, int], tolerance: float, u: Floats) -> float:
    """Swap between a pair of blocks while a swap pays more than tolerance. Returns the growth of F. u [N-1, T] is scratch."""
    g, h = pair
    rivals(norms, g, h, u)
    mine = np.flatnonzero(owner == g).astype(np.int32)
    other = np.flatnonzero(owner == h).astype(np.int32)
    larger = np.empty(norms.shape[1], np.float32)
    total = 0.0
    for i in range(mine.shape[0]):
        slope = worth(norms[g], norms[h], u, mass_t, other)
        now = baseline(norms[g], norms[h], u)
        best, where = tolerance, -1
        for _ in range(min(WIDTH, other.shape[0])):
            j = int(np.argmax(slope))
            slope[j] = -np.inf
            gain = swap_value(norms[g], norms[h], u, mass_t[mine[i]], mass_t[other[j]], larger) - now
            if gain > best:
                best, where = gain, j
        if where >= 0:
            apply_swap(mass_t, owner, norms, mine[i], other[where])
            mine[i], other[where] = other[where], mine[i]
            total += best
    return total


@njit(nogil=True, cache=True)
def polish(mass_t: Floats, owner: Ints, norms: Floats, tolerance: float, stale: Flags) -> None:
    """Improve every stale pair of blocks, pass after pass, until none is stale. Changes owner [f], norms [N, T], stale [N, N]."""
    n_sub, tokens = norms.shape
    u = np.empty((n_sub - 1, tokens), np.float32)
    for _ in range(PASSES):
        moved = False
        for g in range(n_sub):
            for h in range(g + 1, n_sub):
                if stale[g, h]:
                    gain = improve_pair(mass_t, owner, norms, (g, h), tolerance, u)
                    if gain > 0:
                        stale[g], stale[:, g], stale[h], stale[:, h] = True, True, True, True
                        moved = True
                    stale[g, h] = gain > 0
        if not moved:
            break
