"""The contract of placement: what is wanted, what there is room for, and where everything is.

Shapes: L MoE layers, E experts, N blocks (sub-experts) per expert, D devices, S slots per layer. Here a slot is room for one expert (or
for one block), and device d holds the slots d S/D .. (d+1) S/D - 1, as in vLLM and SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Grain = Literal["experts", "blocks"]


@dataclass(frozen=True)
class Demand:
    """What tokens ask of every layer. An expert's load is the work of all its blocks, in tokens of a whole expert."""

    blocks: Floats
    """[L, E, N] how many tokens want a block."""
    flow: Floats
    """[L - 1, E, E] how many tokens want one expert and, a layer later, the other."""

    @property
    def experts(self) -> Floats:
        """[L, E] load."""
        return np.asarray(self.blocks.mean(2))

    def at(self, grain: Grain) -> Floats:
        """[L, U] load of experts, or of blocks, E N of them, in the same unit."""
        layers, experts, parts = self.blocks.shape
        return self.experts if grain == "experts" else self.blocks.reshape(layers, experts * parts) / parts


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is room for. spare: slots of a whole expert beyond one for each, in every layer.

    nodes: machines that the devices are on. link: how many times faster devices of one machine reach each other.
    """

    devices: int
    spare: int = 0
    nodes: int = 1
    link: float = 1.0

    def check(self, experts: int) -> None:
        """UsageError for a room that cannot be divided evenly."""
        if self.devices < 1 or self.nodes < 1 or self.spare < 0 or self.link < 1:
            raise UsageError("devices and nodes are at least 1, spare slots at least 0, a link at least 1 times as fast")
        if self.devices % self.nodes:
            raise UsageError(f"{self.devices} devices are not the same number on {self.nodes} nodes", "give other numbers")
        if (experts + self.spare) % self.devices:
            spare = -experts % self.devices
            raise UsageError(
                f"{experts} experts and {self.spare} spare slots do not fill {self.devices} devices evenly",
                f"--spare {spare} does",
            )


@dataclass(frozen=True)
class ExpertPlacement:
    """slots: [L, S] which expert (or block, numbered e N + n) every slot holds.

    bounds: for every layer what no placement of the same slots can be below in the largest load of a device; 0 where unknown.
    """

    slots: Ints
    devices: int
    grain: Grain = "experts"
    bounds: Floats = field(default_factory=lambda: np.zeros(0))

    @property
    def device_of(self) -> Ints:
        """[S] the device of every slot."""
        return np.asarray(np.arange(self.slots.shape[1]) // (self.slots.shape[1] // self.devices))

    def loads(self, demand: Demand) -> Floats:
        """[L, D] load of every device; replicas share theirs evenly."""
        wanted = demand.at(self.grain)
        found = np.zeros((len(self.slots), self.devices))
        for layer, row in enumerate(self.slots):
            each = wanted[layer] / np.maximum(np.bincount(row, minlength=wanted.shape[1]), 1)
            found[layer] = each[row].reshape(self.devices, -1).sum(1)
        return found

    def check(self, units: int) -> None:
        """AssertionError where an expert or block is nowhere."""
        for row in self.slots:
            assert set(row.tolist()) == set(range(units)), "something has no device"


Policy = Callable[[Demand, Cluster], ExpertPlacement]
