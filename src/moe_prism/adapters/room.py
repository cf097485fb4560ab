"""Memory for more experts than a layer has, behind its own: reserved as addresses, and taken only where something was written.

As ExpertWeave (arXiv 2508.17624) has it: one virtual tensor per layer, physical pages for the experts that are there. On a CPU the system
does it: pages of an anonymous mapping exist once they are written to, and go back when they are said to be not needed. On a GPU all of the
room is taken at once. Shapes: E experts of the layer, R experts of room, f neurons, d hidden.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from ..model import MoELayer
from ..model.around import LayerAround


@dataclass(frozen=True)
class Reserved:
    """A parameter [E, ...] as the beginning of a tensor [E + R, ...]."""

    parameter: Tensor
    whole: Tensor
    memory: mmap.mmap | None

    @classmethod
    def behind(cls, parameter: Tensor, room: int) -> Reserved:
        """Move a parameter there; its values stay."""
        own, count = parameter.data, parameter.shape[0]
        each = own[0].numel()
        shape, strides = (count + room, *own.shape[1:]), own.stride()
        if own.device.type == "cpu":
            size = shape[0] * each * own.element_size()
            memory: mmap.mmap | None = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            flat = torch.frombuffer(memory, dtype=own.dtype)
        else:
            memory, flat = None, own.new_zeros(shape[0] * each)
        whole = flat.as_strided(shape, strides)
        whole[:count] = own
        parameter.data = whole[:count]
        return cls(parameter, whole, memory)

    def release(self, slot: int) -> None:
        """Give the whole pages of a slot back. What is read there afterwards is zero."""
        if self.memory is None:
            return
        size = self.whole[0].numel() * self.whole.element_size()
        begin = -(-slot * size // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (slot + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self.memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def reserve(layer: MoELayer, room: int) -> list[Reserved]:
    """Make room for R experts behind those of a layer, without a change of what it computes.

    UsageError for a layer whose experts do not lie one behind the other in its parameters.
    """
    parameters = list(layer.module.parameters())
    if not parameters or not all(_lies_by_expert(p.data, layer.num_experts) for p in parameters):
        raise UsageError(
            f"the experts of '{layer.name}' do not lie one behind the other in memory", "merge the adapter into the model instead"
        )
    return [Reserved.behind(parameter, room) for parameter in parameters]


def _lies_by_expert(own: Tensor, experts: int) -> bool:
    """Whether a tensor is [E, ...] with each expert's values in one piece, and one piece behind the other."""
    if own.dim() not in (2, 3) or own.shape[0] != experts:
        return False
    reach = 1 + sum((size - 1) * step for size, step in zip(own.shape[1:], own.stride()[1:], strict=True))
    return own[0].numel() == reach == own.stride(0)


class RoomyLayer(LayerAround):
    """A layer with the room behind its experts: E + R of them in the same views. It computes nothing by itself but what a layer can."""

    def __init__(self, layer: MoELayer, reserved: Sequence[Reserved]) -> None:
        self.layer, self.reserved = layer, reserved
        self.name, self.module, self.index = layer.name, layer.module, layer.index
        self.num_experts, self.hidden, self.width = len(reserved[0].whole), layer.hidden, layer.width
        for each in reserved:  # the layer's own views, for as long as they are taken of everything
            each.parameter.data = each.whole
        found = (layer.gate, layer.up, layer.down, layer.gate_bias, layer.up_bias, layer.down_bias)
        self._views = tuple(None if view is None else view.detach() for view in found)
        for each in reserved:
            each.parameter.data = each.whole[: layer.num_experts]

    @property
    def gate(self) -> Tensor | None:
        return self._views[0]

    @property
    def up(self) -> Tensor:
        return self._view(1)

    @property
    def down(self) -> Tensor:
        return self._view(2)

    def _view(self, which: int) -> Tensor:
        view = self._views[which]
        assert view is not None
        return view

    @property
    def gate_bias(self) -> Tensor | None:
        return self._views[3]

    @property
    def up_bias(self) -> Tensor | None:
        return self._views[4]

    @property
    def down_bias(self) -> Tensor | None:
        return self._views[5]

    @property
    def bytes_per_expert(self) -> int:
        """Of memory that one tuned expert takes."""
        return sum(each.whole[0].numel() * each.whole.element_size() for each in self.reserved)

    def matrices(self, expert: int) -> tuple[Tensor, ...]:
        """gate (where there is one) and up [f, d] and down [d, f] of one expert or slot: writing to them writes it."""
        return tuple(view[expert] for view in (self.gate, self.up, self.down) if view is not None)

    def copy_expert(self, source: int, slot: int) -> None:
        """Everything of an expert, biases too, into a slot."""
        for each in self.reserved:
            each.whole[slot].copy_(each.whole[source])

    def release(self, slot: int) -> None:
        """A slot's memory goes back to the system, where that can be."""
        for each in self.reserved:
            each.release(slot)

    def storage(self) -> tuple[int, ...]:
        return tuple(each.whole.data_ptr() for each in self.reserved)

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Its module knows the layer's own experts alone, so this is computed expert by expert."""
        return self.by_expert(x, index, weight)
