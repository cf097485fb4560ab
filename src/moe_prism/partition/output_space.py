"""Swaps that lower what a partition costs the layer's output, rather than the mass it drops.

With y_n = W_down[:, S_n] a[S_n] the output of block n at a token and D its `dropped` blocks of smallest norm, the cost is the sum over
tokens of ||sum of y_n over D||^2: contributions that cancel cost nothing, contributions that add up cost more than their norms say.

For fixed D let r be the dropped sum. Block g gives neuron i to block h and takes j: where only g is dropped r gains
delta = w_j a_j - w_i a_i, where only h is, it loses it, elsewhere nothing changes. With s = +1, -1, 0 for these three the cost changes by

    2 (P_j - P_i) + E_i + E_j - 2 (w_i . w_j) C_ij,   P_c = sum s a_c (w_c . r),  E_c = |w_c|^2 sum |s| a_c^2,  C_ij = sum |s| a_i a_j

so one matrix product prices all swaps of a pair of blocks. Swaps it likes are made, and kept if the cost with D chosen anew is lower.
"""

from __future__ import annotations

from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .base import Doubles, Floats, Partition, check_problem, cost, owner_of, perm_of

TOKENS = 1024  # rows used at most
PASSES = 4
TRIES = 4  # single swaps tried per pair of blocks when no group of swaps pays
TOLERANCE = 1e-6  # of the cost: smaller gains are rounding

Owner = NDArray[np.integer]


class Refiner(Protocol):
    """Improve a partition with what its solver does not see: signed activations [T, f], routing weights included, and down [d, f]."""

    def __call__(self, start: Partition, activations: Floats, down: Floats, n_sub: int, dropped: int) -> Partition: ...


def output_error(activations: Floats, down: Floats, perm: Owner, n_sub: int, dropped: int) -> float:
    """The cost of the module text, from scratch in float64."""
    a, w = activations.astype(np.float64), down.astype(np.float64)
    y = np.stack([a[:, block] @ w[:, block].T for block in np.split(perm, n_sub)])
    order = np.argsort((y**2).sum(2), axis=0, kind="stable")[:dropped]
    return float((np.take_along_axis(y, order[:, :, None], 0).sum(0) ** 2).sum())


def refine(start: Partition, activations: Floats, down: Floats, n_sub: int, dropped: int) -> Partition:
    """start with pairs of blocks improved in turn until none improves or PASSES are done; never worse than it on the rows used.

    The result's cost stays in units of mass, for |a_j| ||w_j||; its trace holds (pass, output error). Raises as `Solver` says.
    """
    rows = np.ascontiguousarray(activations[:: -(-len(activations) // TOKENS)])
    mass = check_problem(np.abs(activations) * np.linalg.norm(down, axis=0), n_sub, dropped)
    state = Search(rows, down, owner_of(start.perm, n_sub), n_sub, dropped)
    trace = [(0.0, state.error)]
    for number in range(PASSES):
        gained = [state.improve(g, h) for g, h in combinations(range(n_sub), 2)]
        trace.append((number + 1.0, state.error))
        if not any(gained):
            break
    perm = perm_of(state.owner, n_sub)
    return Partition(perm, cost(mass, perm, n_sub, dropped), tuple(trace))


class Search:
    """A partition (owner [f]), its block outputs y [N, T, d], which of them are left out [N, T], and its error."""

    def __init__(self, activations: Floats, down: Floats, owner: Owner, n_sub: int, dropped: int) -> None:
        self.a, self.w, self.owner, self.dropped = activations, down, owner, dropped
        self.power = (down.astype(np.float64) ** 2).sum(0)
        self.y = np.stack([activations[:, owner == n] @ down[:, owner == n].T for n in range(n_sub)])
        self.norms = (self.y.astype(np.float64) ** 2).sum(2)
        self.out, self.error = self._choose(self.y, self.norms)

    def _choose(self, y: Floats, norms: Doubles) -> tuple[NDArray[np.bool_], float]:
        order = np.argsort(norms, axis=0, kind="stable")[: self.dropped]
        out = np.zeros(norms.shape, np.bool_)
        np.put_along_axis(out, order, True, axis=0)
        total = np.einsum("nt,ntd->td", out.astype(np.float32), y)
        return out, float((total.astype(np.float64) ** 2).sum())

    def prices(self, g: int, h: int) -> tuple[Owner, Owner, Doubles]:
        """Neurons of g, neurons of h, and the change of error [of g, of h] of every swap while the choice of blocks stays."""
        mine, other = np.flatnonzero(self.owner == g), np.flatnonzero(self.owner == h)
        rows = self.out[g] != self.out[h]
        sign = np.where(self.out[g, rows], 1.0, -1.0)[:, None]
        r = np.einsum("nt,ntd->td", self.out[:, rows].astype(np.float32), self.y[:, rows])

        def parts(ids: Owner) -> tuple[Floats, Doubles, Doubles]:
            a = self.a[rows][:, ids]
            return (
                a,
                (sign * a * (r @ self.w[:, ids])).sum(0, dtype=np.float64),
                self.power[ids] * (a * a).sum(0, dtype=np.float64),
            )

        (ai, pi, ei), (aj, pj, ej) = parts(mine), parts(other)
        cross = (self.w[:, mine].T @ self.w[:, other]) * (ai.T @ aj)
        change: Doubles = (2 * pj + ej)[None, :] + (ei - 2 * pi)[:, None] - 2 * cross
        return mine, other, change

    def improve(self, g: int, h: int) -> bool:
        """Swap between two blocks while that lowers the error."""
        ever = False
        while True:
            mine, other, change = self.prices(g, h)
            if not any(self._swap(g, h, mine[i], other[j]) for i, j in _proposals(change)):
                return ever
            ever = True

    def _swap(self, g: int, h: int, give: Owner, take: Owner) -> bool:
        """Exchange neurons `give` of g with `take` of h if the error falls by more than rounding."""
        delta = self.a[:, take] @ self.w[:, take].T - self.a[:, give] @ self.w[:, give].T
        y, norms = self.y.copy(), self.norms.copy()
        y[g] += delta
        y[h] -= delta
        norms[[g, h]] = (y[[g, h]].astype(np.float64) ** 2).sum(2)
        out, error = self._choose(y, norms)
        if error >= self.error * (1 - TOLERANCE):
            return False
        self.y, self.norms, self.out, self.error = y, norms, out, error
        self.owner[give], self.owner[take] = h, g
        return True


def _proposals(change: Doubles) -> list[tuple[Owner, Owner]]:
    """Groups of disjoint swaps to try, largest group first: all that pay, half of them, ..., then the TRIES best single ones."""
    order = np.argsort(change, axis=None, kind="stable")
    i, j = np.unravel_index(order[: 8 * len(change)], change.shape)
    chosen: list[int] = []
    rows: set[int] = set()
    columns: set[int] = set()
    for place in np.flatnonzero(change[i, j] < 0):
        if int(i[place]) not in rows and int(j[place]) not in columns:
            chosen.append(int(place))
            rows.add(int(i[place]))
            columns.add(int(j[place]))
    groups: list[tuple[Owner, Owner]] = []
    size = len(chosen)
    while size > 1:
        groups.append((i[chosen[:size]], j[chosen[:size]]))
        size //= 2
    return groups + [(i[p : p + 1], j[p : p + 1]) for p in range(min(TRIES, len(i)))]
