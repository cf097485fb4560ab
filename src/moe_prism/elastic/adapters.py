"""The adapters of a model that is loaded: many fine-tunes of experts beside one base, each token with its own (ExpertWeave).

arXiv 2508.17624. Router, attention and every other weight are the base's. A base model with adapters computes what it computed before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..adapters.file import Adapter
from ..adapters.room import RoomyLayer, reserve
from ..adapters.table import BASE, AdapterTable
from ..errors import UsageError
from .bind import refuse_with_adapters
from .execute.memory import InMemory
from .execute.woven import Woven
from .runtime import Elastic
from .side_tensors import REPAIR

MOST_ADAPTERS = 256


@dataclass(frozen=True)
class Loaded:
    """An adapter in memory. number: what a step calls it; experts: tuned ones of all layers; bytes: of memory that they take."""

    name: str
    number: int
    experts: int
    bytes: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Adapters:
    """Room for tuned experts in a model that computes in memory. `load` and `unload` may come between any two forwards."""

    def __init__(self, elastic: Elastic, base: str, room: Sequence[int]) -> None:
        """base: digest of the model's weights; room: tuned experts that each MoE layer can take.

        UsageError for a model whose experts are not in memory one behind the other, that is repaired, or that has adapters already.
        """
        if any(type(layer.executor) is not InMemory for layer in elastic.layers):
            raise UsageError("adapters need the model's experts in memory", "leave --expert-memory out")
        if any(REPAIR in layer.parts.tensors for layer in elastic.layers):
            raise UsageError("adapters do not go with a repaired folder", "use the folder it was recovered from")
        if elastic.woven:
            raise UsageError("the model has adapters already", "load one more into them")
        self.elastic, self.base = elastic, base
        self.loaded: dict[str, Loaded] = {}
        for layer, own in zip(elastic.layers, room, strict=True):
            inner = layer.parts.layer
            if inner.up.device.type == "cpu":
                inner.arrange()  # as compiled code reads it
            roomy = RoomyLayer(inner, reserve(inner, own))
            layer.forget_weights()  # they moved
            layer.woven = Woven(layer.parts, roomy, AdapterTable(inner.num_experts, own, MOST_ADAPTERS))
        elastic.woven = True

    @property
    def layers(self) -> list[Woven]:
        """Of every MoE layer."""
        return [layer.woven for layer in self.elastic.layers if layer.woven is not None]

    @property
    def bytes(self) -> int:
        """Of memory that all tuned experts take."""
        return sum(own.bytes for own in self.loaded.values())

    @property
    def reserved(self) -> int:
        """Bytes of addresses for tuned experts. On a GPU, memory."""
        return sum(own.table.room * own.layer.bytes_per_expert for own in self.layers)

    def number(self, name: str) -> int:
        """What a step calls an adapter. UsageError for one that is not loaded."""
        if name not in self.loaded:
            raise UsageError(f"no adapter '{name[:64]}' is loaded", f"choose one of: {', '.join(self.loaded) or 'none'}")
        return self.loaded[name].number

    def check(self, name: str, adapter: Adapter) -> None:
        """UsageError for an adapter that is not of this model, or for which there is no room."""
        form, layers = adapter.form, self.layers
        if form.base != self.base:
            raise UsageError(f"adapter '{name}' was made for other weights than these", "make it from a fine-tune of this model")
        there = {(own.layer.hidden, own.layer.width, own.table.experts, own.layer.gate is not None) for own in layers}
        if there != {(form.hidden, form.width, form.experts, form.gated)} or len(form.layers) != len(layers):
            raise UsageError(f"adapter '{name}' is of another shape than the model", "make it from a fine-tune of this model")
        if name in self.loaded:
            raise UsageError(f"adapter '{name}' is loaded already", "unload it first")
        if len(self.loaded) == MOST_ADAPTERS:
            raise UsageError(f"{MOST_ADAPTERS} adapters are loaded", "unload one")
        for i, (own, tuned) in enumerate(zip(layers, form.layers, strict=True)):
            if len(tuned) > own.table.free:
                raise UsageError(
                    f"adapter '{name}' tunes {len(tuned)} experts of layer {i}, and there is room for {own.table.free}",
                    "unload another, or start with a larger --adapter-room",
                )

    @torch.no_grad()
    def load(self, name: str, adapter: Adapter) -> Loaded:
        """Put an adapter's experts into memory. Nothing of the base or of other adapters is written. UsageError as `check`."""
        self.check(name, adapter)
        taken = {own.number for own in self.loaded.values()}
        number = next(n for n in range(MOST_ADAPTERS) if n not in taken)
        try:
            size = sum(self._write(number, i, adapter) for i in range(len(self.layers)))
        except BaseException:
            self._free(number)
            raise
        self.loaded[name] = Loaded(name, number, sum(map(len, adapter.form.layers)), size, adapter.digest)
        return self.loaded[name]

    def _write(self, number: int, layer: int, adapter: Adapter) -> int:
        """An adapter's experts of one layer; returns the bytes that they take."""
        own, tuned = self.layers[layer], adapter.form.layers[layer]
        slots = own.table.add(number, tuned)
        for expert, slot in zip(tuned, slots, strict=True):
            own.layer.copy_expert(expert, slot)
        views = [view for view in (own.layer.gate, own.layer.up, own.layer.down) if view is not None]
        for matrix, view in enumerate(views if tuned else ()):
            view[slots] = adapter.written(layer, matrix, view[list(tuned)])
        return len(slots) * own.layer.bytes_per_expert

    def _free(self, number: int) -> None:
        for own in self.layers:
            for slot in own.table.remove(number):
                own.layer.release(slot)

    def unload(self, name: str) -> Loaded:
        """Take an adapter out; the system gets its memory back. No step may name it any more. UsageError for one that is not loaded."""
        self.number(name)
        gone = self.loaded.pop(name)
        self._free(gone.number)
        return gone

    def detach(self) -> None:
        """The model has no room for adapters any more; what it computes stays."""
        for layer in self.elastic.layers:
            layer.woven = None
        self.elastic.woven = False
        self.loaded.clear()

    @contextmanager
    def at(self, name: str | None) -> Iterator[None]:
        """Inside, all tokens have this adapter, at the operating point of now and at those that are entered; None: none."""
        elastic, number = self.elastic, BASE if name is None else self.number(name)
        for point in elastic.step.bound.points:
            refuse_with_adapters(point)
        before = elastic.step, elastic.adapter
        elastic.step, elastic.adapter = replace(elastic.step, adapter=number), number
        try:
            yield
        finally:
            elastic.step, elastic.adapter = before


def of_tokens(numbers: Mapping[str, Loaded], named: Sequence[tuple[str, int]]) -> int | torch.Tensor:
    """The adapter of each token [T] of a batch. named: per request the adapter's name, "" for none, and its tokens."""
    own = [numbers[name].number if name else BASE for name, _ in named]
    if len(set(own)) == 1:
        return own[0]
    return torch.tensor(own).repeat_interleave(torch.tensor([count for _, count in named]))
