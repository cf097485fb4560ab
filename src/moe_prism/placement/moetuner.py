"""MoETuner (arXiv 2502.06643): experts into clusters of even load, then clusters onto devices with little traffic between layers.

Its two programs, and what is ours: every cluster holds the same number of slots, as engines want it, and exactly one copy of a slot (the
paper's constraints do not say so). The first program is SciPy's mixed-integer solver where it is small, from EPLB's answer by swaps where
not. The second (`devices.py`) is exact without one. Both stages together are not the joint optimum: a test counts how far they are.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from .base import Cluster, Demand, ExpertPlacement, Floats, Ints
from .devices import assign
from .packing import pack, replicate, shares, swap, unevenness

MOST_CHOICES = 64
"""Slots x devices of a layer; larger programs are left to swaps."""
GAP = 0.025  # the paper's
NODES = 500  # of the solver's tree: a limit in seconds would make the answer depend on the machine


def moetuner(demand: Demand, room: Cluster) -> ExpertPlacement:
    """The same replicas as EPLB's where there is spare room."""
    load = demand.experts
    room.check(load.shape[1])
    orders, bounds = [], []
    for row in load:
        owners = replicate(row, len(row) + room.spare)
        order, bound = clusters(shares(row, owners), room.devices)
        orders.append(owners[order])
        bounds.append(bound)
    return ExpertPlacement(assign(np.stack(orders), demand.flow, room), room.devices, "experts", np.array(bounds))


def clusters(load: Floats, devices: int) -> tuple[Ints, float]:
    """[S] items by cluster, and what the largest cluster cannot be below."""
    best = swap(load, pack(load, devices), devices)
    bound = max(float(load.sum()) / devices, _fullest(load, len(load) // devices))
    if devices > 1 and len(load) > devices and len(load) * devices <= MOST_CHOICES:
        solved = _solve(load, devices)
        if solved is not None:
            solved = swap(load, solved, devices)
            sums = [load[order].reshape(devices, -1).sum(1) for order in (best, solved)]
            best = solved if unevenness(sums[1]) < unevenness(sums[0]) else best
    return best, bound


def _fullest(load: Floats, room: int) -> float:
    """The heaviest item comes with others: at best with the lightest."""
    ordered = np.sort(load)
    return float(ordered[-1] + ordered[: room - 1].sum())


def _solve(load: Floats, devices: int) -> Ints | None:
    """Least sum of |cluster - mean|: x[s, c] says who is where, t[c] >= |cluster c - mean|. None where the solver found nothing."""
    items, mean = len(load), float(load.sum()) / devices
    choices = items * devices
    each_once = np.zeros((items, choices + devices))
    each_once[np.repeat(np.arange(items), devices), np.arange(choices)] = 1
    counts, above, below = (np.zeros((devices, choices + devices)) for _ in range(3))
    for device in range(devices):
        counts[device, device:choices:devices] = 1
        above[device, device:choices:devices] = load
        below[device, device:choices:devices] = load
        above[device, choices + device] = -1
        below[device, choices + device] = 1
    room = items // devices
    highest = np.ones(choices + devices)
    highest[choices:] = np.inf
    heaviest = int(np.argmax(load)) * devices
    highest[heaviest + 1 : heaviest + devices] = 0  # clusters are alike: the heaviest item is in the first
    found = milp(
        np.r_[np.zeros(choices), np.ones(devices)],
        integrality=np.r_[np.ones(choices), np.zeros(devices)],
        bounds=Bounds(0, highest),
        constraints=[
            LinearConstraint(each_once, 1, 1),
            LinearConstraint(counts, room, room),
            LinearConstraint(above, -np.inf, mean),
            LinearConstraint(below, mean, np.inf),
        ],
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if found.x is None:
        return None
    where = found.x[:choices].reshape(items, devices).argmax(1)
    return np.argsort(where, kind="stable")
