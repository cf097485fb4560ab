"""DeepSeek's balancer EPLB, from its description: replicas for the most loaded, then the heaviest first to the lightest device.

On several nodes whole groups of experts are packed onto nodes first, so that a group's tokens stay on one. The groups here are as many as
nodes can share evenly: DeepSeek's models have groups of their own, others a group per expert.
"""

from __future__ import annotations

import numpy as np

from .base import Cluster, Demand, ExpertPlacement, Floats, Ints
from .packing import pack, replicate, shares


def eplb(demand: Demand, room: Cluster, groups: int | None = None) -> ExpertPlacement:
    """groups: of neighbouring experts that stay on one node; as many as experts where nothing is said."""
    load = demand.experts
    return ExpertPlacement(np.stack([balanced(row, room, groups or len(row)) for row in load]), room.devices)


def balanced(load: Floats, room: Cluster, groups: int) -> Ints:
    """[S] the unit of every slot of one layer, from the load of its units."""
    room.check(len(load))
    slots, nodes = len(load) + room.spare, room.nodes
    if groups % nodes or slots % nodes:
        nodes, groups = 1, 1
    size = len(load) // groups
    per_node = pack(load.reshape(groups, size).sum(1), nodes).reshape(nodes, -1)
    found = []
    for held in per_node:
        units = (held[:, None] * size + np.arange(size)).ravel()
        owners = replicate(load[units], slots // nodes)
        found.append(units[owners[pack(shares(load[units], owners), room.devices // nodes)]])
    return np.concatenate(found)
