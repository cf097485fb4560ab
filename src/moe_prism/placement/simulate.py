"""What a placement costs when a trace is served: who waits for whom, and what crosses the wire.

Requests are data-parallel: request r lives on device r mod D. In every step and layer a token's hidden vector goes once to every other
device that computes a slot of it, and one vector comes back from each. A step waits for its slowest device in every layer. Times are in
tokens of a whole expert; nothing else of a step is in them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..offload.trace import Trace
from .base import ExpertPlacement, Floats, Ints
from .demand import wanted


@dataclass(frozen=True)
class PlacementCost:
    """straggler: mean over steps of the slowest device's time, summed over layers; even: what it were if all were equally loaded.

    largest: over all steps together, the load of the most loaded device, summed over layers, per step. sends: hidden vectors that leave
    their device, per token and layer. at_home: share of slots that needed none. between: sends of the busiest pair of devices, as a
    share of what it would be if all pairs had the same.
    """

    straggler: float
    even: float
    largest: float
    sends: float
    at_home: float
    between: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def simulate(trace: Trace, placement: ExpertPlacement) -> PlacementCost:
    """Rows of one step of the trace are computed together."""
    steps = np.cumsum(np.r_[0, np.diff(trace.step) != 0])
    home = trace.request % placement.devices
    keep = wanted(trace)
    waits = largest = 0.0
    sent, stayed, slots = 0, 0, 0
    pairs = np.zeros((placement.devices, placement.devices))
    for layer in range(trace.layers):
        rows, devices = _where(trace, keep[:, layer], layer, placement)
        load = np.bincount(steps[rows] * placement.devices + devices, minlength=(steps[-1] + 1) * placement.devices)
        by_step = load.reshape(-1, placement.devices) / trace.n_sub
        waits += float(by_step.max(1).sum())
        largest += float(by_step.sum(0).max())
        visits = np.unique(rows * placement.devices + devices)
        origin, target = home[visits // placement.devices], visits % placement.devices
        away = origin != target
        np.add.at(pairs, (origin[away], target[away]), 1)
        sent += int(away.sum())
        stayed += int((home[rows] == devices).sum())
        slots += len(rows)
    count = int(steps[-1]) + 1
    even = pairs.sum() / max(1, placement.devices * (placement.devices - 1))
    return PlacementCost(
        straggler=waits / count,
        even=slots / trace.n_sub / placement.devices / count,
        largest=largest / count,
        sends=sent / (len(trace) * trace.layers),
        at_home=stayed / max(1, slots),
        between=float(pairs.max() / even) if even else 0.0,
    )


def _where(trace: Trace, keep: Floats, layer: int, placement: ExpertPlacement) -> tuple[Ints, Ints]:
    """(row of the trace, device) of every slot that is computed; replicas take turns, row by row."""
    rows, ranks, parts = np.nonzero(keep)
    ids = trace.expert_ids[rows, layer, ranks].astype(np.int64)
    units = ids if placement.grain == "experts" else ids * trace.n_sub + parts
    held = placement.slots[layer]
    order = np.argsort(held, kind="stable")
    count = np.bincount(held, minlength=int(units.max(initial=0)) + 1)
    first = np.r_[0, np.cumsum(count)[:-1]]
    return rows, placement.device_of[order[first[units] + rows % count[units]]]
