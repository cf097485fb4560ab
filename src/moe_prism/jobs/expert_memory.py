"""Whether a layer's experts are in memory while a job takes one layer after the other, or lie in a mapped file, and what either takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..artefact.source import Weights
from ..checkpoint.mapped import TOGETHER
from ..options.calibrate import CalibrateOptions
from .resources import FLOAT32, SIZED_FOR, free_memory, largest, largest_layer, pass_parts, told

MAPPED = "experts_on_disk"
"""Says that a layer's experts lie in a file beside the output while it is worked on."""


def experts_bytes(weights: Weights) -> int:
    """The experts of a layer in float32."""
    layer = largest_layer(weights)
    return layer.num_experts * layer.parameters_per_expert() * FLOAT32


def loading_bytes(weights: Weights, experts: int) -> int:
    """A layer's experts, so many bytes, while they are read: the tensors of the files, those put together, and the result.

    What is dequantized is so in float32, all else is put together in its own type.
    """
    size = FLOAT32 if weights.dequantized or weights.keep else min(FLOAT32, weights.bytes_per_weight)
    return int(3 * experts * size / FLOAT32)


class ExpertMemory(NamedTuple):
    """What a layer's experts take in memory: while they are read, afterwards, and while the profile runs."""

    loading: int
    there: int
    profiled: int

    @classmethod
    def in_memory(cls, weights: Weights) -> ExpertMemory:
        """Where they all lie in memory."""
        whole = experts_bytes(weights)
        # of some families one of an expert's matrices is turned round, which takes its size once more
        return cls(loading_bytes(weights, whole), whole, whole + whole // 2)

    @classmethod
    def on_disk(cls, weights: Weights) -> ExpertMemory:
        """A few at a time. Pages of the file that are in use are the system's to take back."""
        layer = largest_layer(weights)
        few = min(TOGETHER, layer.num_experts) * layer.parameters_per_expert() * FLOAT32
        return cls(3 * few, few, few)


def with_room(weights: Weights, need: Callable[[ExpertMemory], dict[str, Any]]) -> dict[str, Any]:
    """What is needed with a layer's experts in memory; on disk, where that is more than there is, and a few of them can be read alone."""
    found = need(ExpertMemory.in_memory(weights))
    if found["peak_memory_bytes"] <= memory_there() or weights.keep or weights.stream is None:
        return found
    if not weights.stream.can_map(largest_layer(weights).name):
        return found
    mapped = need(ExpertMemory.on_disk(weights))
    return {**mapped, "disk_bytes": mapped["disk_bytes"] + experts_bytes(weights), MAPPED: True}


def memory_there() -> int:
    """Of the machine that is asked for."""
    machine = SIZED_FOR.get()
    return machine.ram if machine and machine.ram is not None else free_memory()


def needed_by_calibration(weights: Weights, options: CalibrateOptions) -> dict[str, Any]:
    """What `calibrate` needs, which does nothing with the weights but run them."""
    parts, declared, _ = pass_parts(weights, options)
    if not options.low_memory:
        return told(parts, 2 * declared)

    def need(experts: ExpertMemory) -> dict[str, Any]:
        reading = {**parts, "weights_bytes": experts.loading, "activations_bytes": 0}
        return told(largest([reading, {**parts, "weights_bytes": experts.there}]), 2 * declared)

    return with_room(weights, need)
