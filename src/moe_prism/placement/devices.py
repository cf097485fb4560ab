"""Clusters onto devices, layer by layer: few tokens between any two devices where a token's next expert is elsewhere.

The cost of two neighbouring layers is the largest flow between two different devices, over the speed of their link. Where all links
are alike, only who shares a device matters. Then every pair of layers has its own best answer, by sorting: the largest flows are kept at
home as long as they form a matching. Where links differ, the layers are a chain over the D! orders: exact up to `MOST_EXACT` devices,
swaps beyond.
"""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
from scipy.optimize import linear_sum_assignment

from .base import Cluster, Floats, Ints

MOST_EXACT = 5
SWEEPS = 20


def assign(slots: Ints, flow: Floats, room: Cluster) -> Ints:
    """[L, S] the same clusters on other devices."""
    held = slots.reshape(len(slots), room.devices, -1)
    between = [_between(held[i], held[i + 1], flow[i]) for i in range(len(held) - 1)]
    if room.nodes == 1 or room.link == 1:
        orders = _matched(between, room.devices)
    elif room.devices <= MOST_EXACT:
        orders = _chained(between, room)
    else:
        orders = _swapped(between, room)
    return np.stack([held[i][order].ravel() for i, order in enumerate(orders)])


def slowness(room: Cluster) -> Floats:
    """[D, D] of the link between two devices; 0 on the diagonal, where nothing is sent."""
    node = np.arange(room.devices) // (room.devices // room.nodes)
    found = np.where(node[:, None] == node[None], 1.0 / room.link, 1.0)
    np.fill_diagonal(found, 0)
    return found


def traffic(between: list[Floats], orders: list[Ints], room: Cluster) -> float:
    """What is made small: for every two layers the largest flow between two devices, in the time of a slow link."""
    slow = slowness(room)
    return float(sum((f[np.ix_(a, b)] * slow).max() for f, a, b in zip(between, orders, orders[1:], strict=False)))


def _between(one: Ints, other: Ints, flow: Floats) -> Floats:
    """[D, D] flow between the clusters of two layers; replicas share theirs."""
    copies = [np.bincount(held.ravel(), minlength=len(flow)) for held in (one, other)]
    each = flow / np.maximum(copies[0], 1)[:, None] / np.maximum(copies[1], 1)[None]
    return np.asarray(each[one.ravel()][:, other.ravel()].reshape(one.shape + other.shape).sum((1, 3)))


def _matched(between: list[Floats], devices: int) -> list[Ints]:
    orders = [np.arange(devices)]
    for flow in between:
        follows = _at_home(flow)
        orders.append(follows[orders[-1]])
    return orders


def _at_home(flow: Floats) -> Ints:
    """[D] for every cluster the one of the next layer that shares its device: the largest flow between others is least, then their sum."""
    worth = np.zeros_like(flow)
    for value in np.unique(flow)[::-1]:
        large = flow >= value
        if large.sum(0).max() > 1 or large.sum(1).max() > 1:
            break  # two of them leave one device, or reach one: it cannot keep both
        worth = np.where(large, flow.sum() + 1, 0.0)
    return np.asarray(linear_sum_assignment(worth + flow, maximize=True)[1], np.int64)


def _chained(between: list[Floats], room: Cluster) -> list[Ints]:
    """The shortest way through the layers, over all orders of each."""
    orders = np.array(list(permutations(range(room.devices))), np.int64)
    slow = slowness(room)
    total, back = np.zeros(len(orders)), []
    for flow in between:
        step = np.stack([(flow[order][:, orders].transpose(1, 0, 2) * slow).max((1, 2)) for order in orders])
        whole = total[:, None] + step
        back.append(whole.argmin(0))
        total = whole.min(0)
    chosen = [int(total.argmin())]
    for came in reversed(back):
        chosen.append(int(came[chosen[-1]]))
    return [orders[i] for i in reversed(chosen)]


def _swapped(between: list[Floats], room: Cluster) -> list[Ints]:
    """From what is best where links are alike, two clusters of a layer change places while that is better."""
    orders = [order.copy() for order in _matched(between, room.devices)]
    for _ in range(SWEEPS):
        before = traffic(between, orders, room)
        for layer, order in enumerate(orders):
            near = slice(max(0, layer - 1), layer + 2)
            beside = between[max(0, layer - 1) : layer + 1]
            best = traffic(beside, orders[near], room)
            for one, other in combinations(range(room.devices), 2):
                order[[one, other]] = order[[other, one]]
                now = traffic(beside, orders[near], room)
                if now < best:
                    best = now
                else:
                    order[[one, other]] = order[[other, one]]
        if traffic(between, orders, room) >= before:
            break
    return orders
