"""Items onto devices, the same number on each: greedily, and improved by swaps.

Shapes: S items, D devices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .base import Floats, Ints

ROUNDS = 1000


def replicate(load: Floats, slots: int) -> Ints:
    """[slots] which unit every replica is of: each further one goes to the unit with the most load per replica."""
    owners, count = list(range(len(load))), np.ones(len(load))
    for _ in range(slots - len(load)):
        most = int(np.argmax(load / count))
        owners.append(most)
        count[most] += 1
    return np.array(owners, np.int64)


def shares(load: Floats, owners: Ints) -> Floats:
    """[S] load of every replica."""
    return np.asarray((load / np.bincount(owners, minlength=len(load)))[owners])


def pack(load: Floats, devices: int) -> Ints:
    """[S] the items in the order of their slots: the heaviest first, each to the lightest device that has room."""
    room = len(load) // devices
    if room == 1:
        return np.arange(len(load))
    held: list[list[int]] = [[] for _ in range(devices)]
    sums = np.zeros(devices)
    for item in np.argsort(-load, kind="stable"):
        device = int(np.argmin(sums))
        held[device].append(int(item))
        sums[device] += load[item]
        if len(held[device]) == room:
            sums[device] = np.inf
    return np.array([item for row in held for item in row], np.int64)


def unevenness(sums: Floats) -> Floats:
    """[..., D] -> [...] how far devices are from their mean, and a little of the largest of them, which breaks ties."""
    return np.asarray(np.abs(sums - sums.mean(-1, keepdims=True)).sum(-1) + 1e-3 * sums.max(-1))


def swap(load: Floats, order: Ints, devices: int, cost: Callable[[Floats], Floats] = unevenness) -> Ints:
    """The order after the best swap of two items again and again, until none is better."""
    order, room = order.copy(), len(order) // devices
    first, second = np.triu_indices(len(order), 1)
    apart = first // room != second // room
    first, second = first[apart], second[apart]
    row = np.arange(len(first))
    for _ in range(ROUNDS):
        sums = load[order].reshape(devices, room).sum(1)
        change = load[order[second]] - load[order[first]]
        tried = np.repeat(sums[None], len(first), 0)
        tried[row, first // room] += change
        tried[row, second // room] -= change
        costs = cost(tried)
        best = int(np.argmin(costs))
        if costs[best] >= cost(sums) - 1e-9 * (1 + abs(float(cost(sums)))):
            return order
        one, other = first[best], second[best]
        order[one], order[other] = order[other], order[one]
    return order
