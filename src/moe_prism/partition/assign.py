"""Balanced assignment: every block takes exactly f / N neurons and the summed gain is largest (exact, compiled)."""

from __future__ import annotations

import numpy as np
from numba import njit

from .base import Doubles, Ints


@njit(nogil=True, cache=True)
def balance(gain: Doubles) -> Ints:
    """Owner [f] maximising sum of gain[c, owner[c]] over gain [f, N] with f / N neurons per block; N must divide f.

    Successive shortest paths on the N blocks instead of an f x f assignment: give every neuron its favourite block, which is the
    best for the sizes it yields, then move one unit at a time from a block that is too full to one that has room along the
    cheapest chain of moves. Every intermediate assignment is the best for its sizes, hence so is the last.
    """
    f, n_sub = gain.shape
    owner = np.empty(f, np.int32)
    size = np.zeros(n_sub, np.int64)
    for c in range(f):
        owner[c] = np.argmax(gain[c])
        size[owner[c]] += 1
    price = np.full((n_sub, n_sub), np.inf)
    mover = np.full((n_sub, n_sub), -1, np.int64)
    for n in range(n_sub):
        _offers(gain, owner, n, price, mover)
    while True:
        source = int(np.argmax(size))
        if size[source] * n_sub <= f:
            return owner
        parent, distance = _cheapest(price, source)
        sink, best = -1, np.inf
        for n in range(n_sub):
            if size[n] * n_sub < f and distance[n] < best:
                sink, best = n, distance[n]
        size[source] -= 1
        size[sink] += 1
        node, hops = sink, 0
        # The hop limit only matters if rounding closed a loop of zero-cost moves in `parent`.
        while node != source and hops < n_sub:
            owner[mover[parent[node], node]] = node
            node, hops = int(parent[node]), hops + 1
        node = sink
        for _ in range(hops + 1):
            _offers(gain, owner, node, price, mover)
            node = int(parent[node]) if node != source else source


@njit(nogil=True, cache=True)
def _offers(gain: Doubles, owner: Ints, n: int, price: Doubles, mover: Ints) -> None:
    """The cheapest neuron of block n to hand to every other block: price[n, m] and mover[n, m]."""
    price[n] = np.inf
    for c in range(gain.shape[0]):
        if owner[c] == n:
            for m in range(gain.shape[1]):
                loss = gain[c, n] - gain[c, m]
                if m != n and loss < price[n, m]:
                    price[n, m], mover[n, m] = loss, c


@njit(nogil=True, cache=True)
def _cheapest(price: Doubles, source: int) -> tuple[Ints, Doubles]:
    """Bellman-Ford over the blocks: parent [N] and distance [N] from source (moves may have negative cost)."""
    n_sub = price.shape[0]
    distance = np.full(n_sub, np.inf)
    parent = np.full(n_sub, source, np.int32)
    distance[source] = 0.0
    for _ in range(n_sub - 1):
        changed = False
        for n in range(n_sub):
            for m in range(n_sub):
                there = distance[n] + price[n, m]
                # The margin keeps rounding from finding "cheaper" loops for ever.
                if m != source and there + 1e-12 * (1.0 + abs(there)) < distance[m]:
                    distance[m], parent[m], changed = there, n, True
        if not changed:
            break
    return parent, distance
