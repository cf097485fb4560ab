"""The paper's start (arXiv 2510.19366 section 4.1): heavy neurons first, each to the lightest sub-expert that has room."""

from __future__ import annotations

import numpy as np

from .base import Floats, Ints, Partition, check_problem, result


def solve(mass: Floats, n_sub: int, dropped: int, seed: int = 0) -> Partition:
    """Balances total mass. Deterministic: the seed has no effect; equal masses are visited by neuron id."""
    mass = check_problem(mass, n_sub, dropped)
    return result(mass, greedy_owner(mass, n_sub), n_sub, dropped, [])


def greedy_owner(mass: Floats, n_sub: int) -> Ints:
    """Sub-expert of every neuron, int32 [f]."""
    column = mass.sum(0, dtype=np.float64)
    room = np.full(n_sub, mass.shape[1] // n_sub)
    load = np.zeros(n_sub)
    owner = np.empty(mass.shape[1], np.int32)
    for c in np.argsort(-column, kind="stable"):
        n = int(np.argmin(np.where(room > 0, load, np.inf)))
        owner[c] = n
        load[n] += column[c]
        room[n] -= 1
    return owner
