"""Exact price of swapping two neurons, and a descent that uses it. Compiled, holds no lock (nogil), float32.

Minimising the dropped mass is maximising the kept mass F = sum over tokens of the A = N - dropped largest block norms (the total
is fixed). For one pair of blocks, with norms a and b at a token, let p >= q be the (A-1)-th and A-th largest norm of the *other*
blocks (absent: 0). A swap changes a by x and b by -x, and the token's share of F changes by

    max(u, a + x, b - x) - max(u, a, b),   u = max(a + b - p, q)        (A = 1: u = q)

because a + b stays: u is "both kept" or "neither kept", the other terms are "only the larger kept". u does not move while only
this pair is touched, so a swap is priced with five streams and no sorting. Arrays are neuron-major: mass_t [f, T], norms [N, T].
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .base import Doubles, Flags, Floats, Ints

PASSES = 40
WIDTH = 4  # partners every neuron tries per pair of blocks


@njit(nogil=True, cache=True, fastmath=True)
def block_sums(mass_t: Floats, owner: Ints, n_sub: int) -> Floats:
    """Block norms [N, T] of an assignment owner [f]."""
    norms = np.zeros((n_sub, mass_t.shape[1]), np.float32)
    for c in range(mass_t.shape[0]):
        row, norm = mass_t[c], norms[owner[c]]
        for t in range(row.shape[0]):
            norm[t] += row[t]
    return norms


@njit(nogil=True, cache=True, fastmath=True)
def rival(norms: Floats, g: int, h: int, kept: int, top: Floats, u: Floats) -> None:
    """u [T] of the pair (g, h), as the module text defines it. top [A + 1, T] is scratch."""
    tokens = norms.shape[1]
    top[: kept + 1] = 0.0
    for n in range(norms.shape[0]):
        if n in (g, h):
            continue
        # A bubble insertion over all tokens at once: row k of `top` ends as the (k+1)-th largest norm of the others.
        carry = top[kept]
        for t in range(tokens):
            carry[t] = norms[n, t]
        for k in range(kept):
            best = top[k]
            for t in range(tokens):
                x, y = best[t], carry[t]
                best[t] = max(x, y)
                carry[t] = min(x, y)
    q = top[kept - 1]
    if kept == 1:
        for t in range(tokens):  # an array put into another one would have numba compile words for sizes that differ: two seconds
            u[t] = q[t]
        return
    p, a, b = top[kept - 2], norms[g], norms[h]
    for t in range(tokens):
        u[t] = max(a[t] + b[t] - p[t], q[t])


@njit(nogil=True, cache=True, fastmath=True)
def relative(a: Floats, b: Floats, u: Floats, ra: Floats, rb: Floats, ru: Floats) -> None:
    """a, b, u less the token's current max(u, a, b): `swap_gain` then sums small numbers, which keeps float32 exact enough."""
    for t in range(a.shape[0]):
        base = max(u[t], max(a[t], b[t]))
        ra[t], rb[t], ru[t] = a[t] - base, b[t] - base, u[t] - base


@njit(nogil=True, cache=True, fastmath=True)
def swap_gain(ra: Floats, rb: Floats, ru: Floats, out: Floats, into: Floats) -> float:
    """Change of F when block g gives neuron `out` [T] to block h and takes neuron `into` [T]."""
    total = np.float32(0)
    for t in range(ra.shape[0]):
        x = into[t] - out[t]
        total += max(ru[t], max(ra[t] + x, rb[t] - x))
    return float(total)


@njit(nogil=True, cache=True, fastmath=True)
def apply_swap(mass_t: Floats, owner: Ints, norms: Floats, out: int, into: int) -> None:
    """Neurons `out` and `into` change places."""
    g, h = owner[out], owner[into]
    for t in range(mass_t.shape[1]):
        x = mass_t[into, t] - mass_t[out, t]
        norms[g, t] += x
        norms[h, t] -= x
    owner[out], owner[into] = h, g


@njit(nogil=True, cache=True, fastmath=True)
def slopes(ra: Floats, rb: Floats, mass_t: Floats, members: Ints, out: Doubles) -> None:
    """First-order worth of a neuron to block g over block h: its mass where g alone is kept minus where h alone is."""
    for i in range(members.shape[0]):
        row, s = mass_t[members[i]], np.float32(0)
        for t in range(row.shape[0]):
            s += row[t] * ((ra[t] == 0) - np.float32(rb[t] == 0))
        out[i] = s


@njit(nogil=True, cache=True)
def improve_pair(mass_t: Floats, owner: Ints, norms: Floats, pair: tuple[int, int], tolerance: float, work: Floats) -> float:
    """Swap between a pair of blocks while a swap pays more than the tolerance; every neuron tries its WIDTH best partners by slope.

    work [A + 5, T] is scratch. Returns the growth of F.
    """
    g, h = pair
    ra, rb, ru, u = work[0], work[1], work[2], work[3]
    rival(norms, g, h, work.shape[0] - 5, work[4:], u)
    mine = np.flatnonzero(owner == g).astype(np.int32)
    other = np.flatnonzero(owner == h).astype(np.int32)
    slope = np.empty(other.shape[0])
    near = np.empty(min(WIDTH, other.shape[0]), np.int64)
    total = 0.0
    moved = True
    for i in range(mine.shape[0]):
        if moved:
            relative(norms[g], norms[h], u, ra, rb, ru)
            slopes(ra, rb, mass_t, other, slope)
            _largest(slope, near)
        best, where, moved = tolerance, -1, False
        for j in near:
            gain = swap_gain(ra, rb, ru, mass_t[mine[i]], mass_t[other[j]])
            if gain > best:
                best, where, moved = gain, int(j), True
        if moved:
            apply_swap(mass_t, owner, norms, mine[i], other[where])
            mine[i], other[where] = other[where], mine[i]
            total += best
    return total


@njit(nogil=True, cache=True)
def _largest(values: Doubles, out: Ints) -> None:
    """Places of the len(out) largest values; overwrites values. A sort would cost seconds of compilation."""
    for k in range(out.shape[0]):
        best = 0
        for i in range(values.shape[0]):
            if values[i] > values[best]:
                best = i
        out[k] = best
        values[best] = -np.inf


@njit(nogil=True, cache=True)
def polish(mass_t: Floats, owner: Ints, norms: Floats, kept: int, tolerance: float, stale: Flags) -> float:
    """Improve every stale pair of blocks, pass after pass, until none is stale or PASSES are done. Returns the growth of F.

    stale bool [N, N] (upper triangle): pairs to look at. A swap makes all pairs of its two blocks stale again. Prices of other
    pairs move too (through u), but rarely enough to change a decision; they are not looked at again.
    Changes owner [f], norms [N, T] and stale.
    """
    n_sub, tokens = norms.shape
    work = np.empty((kept + 5, tokens), np.float32)
    total = 0.0
    for _ in range(PASSES):
        before = total
        for g in range(n_sub):
            for h in range(g + 1, n_sub):
                if not stale[g, h]:
                    continue
                gain = improve_pair(mass_t, owner, norms, (g, h), tolerance, work)
                if gain > 0:
                    stale[g], stale[:, g], stale[h], stale[:, h] = True, True, True, True
                stale[g, h] = gain > 0
                total += gain
        if total == before:
            break
    return total
