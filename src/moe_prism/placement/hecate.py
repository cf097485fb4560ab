"""Hecate (arXiv 2502.02581): in training, copies of busy experts that last one iteration. A simulator: bytes moved, and who waits for whom.

Every expert's weights and optimiser state live on one device. Before an iteration, the experts that the iteration before kept a device busy
with are copied to idle ones (a sparse all-gather); after it, gradients of the copies go home (a sparse reduce-scatter). It is compared with
experts that stay (static) and with EPLB, which moves them for good, with their state, every so many iterations, and whose replicas add up
their gradients in every one. Times are in tokens of a whole expert; nothing else of an iteration is in them. Shapes: I iterations, L MoE
layers, E experts, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import UsageError
from .base import Cluster, Floats, Ints
from .eplb import balanced

Way = Literal["static", "eplb", "hecate"]
GRADIENT_AND_WEIGHTS = 2


@dataclass(frozen=True, kw_only=True)
class TrainingCluster:
    """What experts are trained on. expert_bytes: of one expert's weights, and of its gradients; state: optimiser state / weights.

    share: of a layer's experts, that many copies at most per iteration (Hecate) or spare slots (EPLB). period: iterations between two
    placements of EPLB.
    """

    devices: int
    expert_bytes: int = 1
    state: float = 6.0
    share: float = 0.25
    period: int = 100

    def copies(self, experts: int) -> int:
        """Of a layer. UsageError for experts that devices do not share evenly, and for numbers out of range."""
        if self.devices < 1 or experts % self.devices:
            raise UsageError(f"{experts} experts are not the same number on {self.devices} devices", "give a divisor")
        if not 0 <= self.share <= self.devices - 1 or self.period < 1 or self.expert_bytes < 0 or self.state < 0:
            raise UsageError(
                f"a share of {self.share}, every {self.period} iterations",
                "give a share of 0 to devices - 1, and a period from 1",
            )
        return int(self.share * experts)


@dataclass(frozen=True)
class TrainingCost:
    """Per iteration [I]. moved: bytes between devices; straggler: the slowest device's time, over all layers; even: if all were alike."""

    moved: Floats
    straggler: Floats
    even: Floats

    def to_json(self) -> dict[str, Any]:
        """Means."""
        return {
            "bytes": float(self.moved.mean()),
            "straggler": float(self.straggler.mean()),
            "of_even": float(self.straggler.sum() / max(1e-300, self.even.sum())),
        }


def simulate_training(load: Floats, cluster: TrainingCluster, way: Way) -> TrainingCost:
    """What iterations cost whose tokens choose experts as load [I, L, E] says. Only iterations that are over decide a placement.

    UsageError for a cluster that the experts do not fit.
    """
    iterations, layers, experts = load.shape
    copies = cluster.copies(experts)
    spare = copies // cluster.devices * cluster.devices  # EPLB's devices have as many slots each
    home = np.arange(experts) // (experts // cluster.devices)
    held = np.stack([_on(home, cluster.devices)] * layers)  # [L, E, D]: slots of an expert on a device
    moved, straggler = np.zeros(iterations), np.zeros(iterations)
    for i in range(iterations):
        if way == "hecate" and i:
            held = np.stack([materialised(row, home, cluster.devices, copies) for row in load[i - 1]])
        elif way == "eplb" and i and i % cluster.period == 0:
            past = load[i - cluster.period : i].sum(0)
            after = np.stack([_eplb(row, cluster.devices, spare) for row in past])
            moved[i] += (1 + cluster.state) * cluster.expert_bytes * int(((after > 0) & (held == 0)).sum())
            held = after
        there = held > 0
        moved[i] += GRADIENT_AND_WEIGHTS * cluster.expert_bytes * int(there.sum() - layers * experts)
        each = load[i] / held.sum(2)  # slots share an expert's tokens evenly
        straggler[i] = float((each[:, :, None] * held).sum(1).max(1).sum())
    return TrainingCost(moved, straggler, load.sum((1, 2)) / cluster.devices)


def materialised(load: Floats, home: Ints, devices: int, copies: int) -> Ints:
    """[E, D]: experts at home, and up to so many copies, each where it takes most off the busiest device for the least busy one.

    load [E]: of the iteration before. No copy is made that would not lower the largest load of the two devices.
    """
    held = _on(home, devices)
    for _ in range(copies):
        each = load / held.sum(1)
        busy = (each[:, None] * held).sum(0)
        most, least = int(busy.argmax()), int(busy.argmin())
        best, expert = busy[most], -1
        for e in np.flatnonzero((held[:, most] > 0) & (held[:, least] == 0)):
            share = load[e] / (held[e].sum() + 1)
            found = max(busy[most] - (each[e] - share), busy[least] + share)
            if found < best * (1 - 1e-12):
                best, expert = found, int(e)
        if expert < 0:
            break
        held[expert, least] = 1
    return held


def _on(home: Ints, devices: int) -> Ints:
    return np.asarray(home[:, None] == np.arange(devices), np.int64)


def _eplb(load: Floats, devices: int, spare: int) -> Ints:
    row = balanced(load, Cluster(devices=devices, spare=spare), len(load)).reshape(devices, -1)
    held = np.zeros((len(load), devices), np.int64)
    for device, experts in enumerate(row):
        held[:, device] = np.bincount(experts, minlength=len(load))
    return held


def loads_of(ids: Ints, experts: int, tokens: int) -> Floats:
    """[I, L, E]: of iterations of so many tokens each, from chosen experts ids [T, L, k] (below 0: none); what is left over is dropped."""
    count, layers = len(ids) // tokens, ids.shape[1]
    found = np.zeros((count, layers, experts))
    for i in range(count):
        for layer in range(layers):
            chosen = ids[i * tokens : (i + 1) * tokens, layer].ravel().astype(np.int64)
            found[i, layer] = np.bincount(chosen[chosen >= 0], minlength=experts)
    return found
