"""Placement of blocks, by the load that they have at the served qualities.

Below full budget the blocks of one expert differ: some are wanted by nearly all of its tokens, some by few. So spare memory should hold
replicas of blocks, not of experts. A replica of a block costs 1/N of an expert's memory.
"""

from __future__ import annotations

import numpy as np

from .base import Cluster, Demand, ExpertPlacement, Floats, Ints
from .eplb import balanced
from .moetuner import clusters


def even_blocks(demand: Demand, room: Cluster) -> ExpertPlacement:
    """EPLB on blocks. An expert is then on many devices, and a token is sent to all of them."""
    parts = demand.blocks.shape[2]
    finer = Cluster(devices=room.devices, spare=room.spare * parts, nodes=room.nodes, link=room.link)
    load = demand.at("blocks")
    return ExpertPlacement(np.stack([balanced(row, finer, len(row)) for row in load]), room.devices, "blocks")


def hot_blocks(demand: Demand, room: Cluster) -> ExpertPlacement:
    """Experts whole on devices of even load; the spare slots for the blocks whose replicas lower the most loaded device most."""
    parts, experts = demand.blocks.shape[2], demand.experts
    room.check(experts.shape[1])
    rows = [_one_layer(load, blocks, room, parts) for load, blocks in zip(experts, demand.at("blocks"), strict=True)]
    return ExpertPlacement(np.stack(rows), room.devices, "blocks")


def _one_layer(load: Floats, blocks: Floats, room: Cluster, parts: int) -> Ints:
    """[S N] the block of every slot of a block."""
    homes = _homes(load, room)
    held = [[e * parts + n for e in row for n in range(parts)] for row in homes]
    size = (len(load) + room.spare) // room.devices * parts
    has = np.zeros((room.devices, len(blocks)), bool)
    for device, row in enumerate(held):
        has[device, row] = True
    left = np.array([size - len(row) for row in held])
    while left.any():
        device, block = _best_replica(blocks, has, left)
        held[device].append(block)
        has[device, block] = True
        left[device] -= 1
    return np.array([block for row in held for block in row], np.int64)


def _homes(load: Floats, room: Cluster) -> list[list[int]]:
    """The experts of every device, as even as they can be, the same number on each but for one."""
    gaps = -len(load) % room.devices
    padded = np.r_[load, np.zeros(gaps)]
    order = clusters(padded, room.devices)[0].reshape(room.devices, -1)
    return [[int(e) for e in row if e < len(load)] for row in order]


def _best_replica(blocks: Floats, has: np.ndarray, left: Ints) -> tuple[int, int]:
    """(device, block): the loads of devices have the least sum of squares after it, so the largest falls first."""
    each = blocks / has.sum(0)
    sums = (has * each).sum(1)
    after = blocks / (has.sum(0) + 1)
    saved = each - after  # on every device that has it
    square = (np.where(has, -2 * sums[:, None] * saved + saved**2, 0)).sum(0)
    change = square[None] + 2 * sums[:, None] * after + after**2
    change[has | (left == 0)[:, None]] = np.inf
    if not np.isfinite(change.min()):  # every block is on every device that has room: twice is of no use, and does no harm
        device = int(np.argmax(left))
        return device, int(np.argmax(np.where(has[device], each, -1)))
    return divmod(int(np.argmin(change)), len(blocks))
