"""A model whose experts are in a store: selection as in memory, from the gate neurons that stay resident; computation by the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compress.changes import change_of
from ..elastic import Elastic
from ..elastic.base import LayerParts
from ..elastic.execute.base import Candidates, Executor, Settled
from ..elastic.side_tensors import REPAIR
from ..errors import UsageError
from ..model import MoELayer
from ..model.around import LayerAround
from ..model.gate_neurons import GateNeurons
from ..point import OperatingPoint
from .choose_misses import Misses, Prepared, choose
from .pack import Pack
from .read_ahead import Guess, ReadAhead
from .record_store import RecordStore
from .store import ExpertStore


class StoredNeurons(LayerAround, GateNeurons):
    """The gate neurons of a layer of a transformers model; its hook is the model's."""

    def __init__(self, layer: MoELayer, tensors: dict[str, Tensor]) -> None:
        super().__init__(layer.name, layer.index, layer.width, tensors, layer.activate)
        self.layer, self.module = layer, layer.module
        self.extra, self.weighs_input = layer.extra, layer.weighs_input

    @property
    def block_name(self) -> str:
        return self.layer.block_name


class FromStore(Executor):
    """Has the store compute what is kept, and a say in what that is: a slot whose record is missing may be skipped (`Misses`)."""

    def __init__(self, parts: LayerParts, elastic: StoredElastic) -> None:
        assert isinstance(elastic.store, ExpertStore)
        self.parts, self.elastic, self.store = parts, elastic, elastic.store
        self.number = parts.layer.index

    @property
    def always_selects(self) -> bool:
        return not self.elastic.misses.is_exact

    @property
    def low_bytes(self) -> int | None:
        pack = self.store.pack
        return pack.layout.low_bytes if pack.has_low else None

    def settle(self, candidates: Candidates) -> Settled:
        return choose(self.store, self.number, candidates, self.elastic.misses)

    def run(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        keep, layer = settled.keep, self.parts.layer
        wanted = settled.prepared
        if wanted is None or wanted.source is not weight:  # sorted for other weights: compensation has scaled them
            parts = keep if self.store.space.parts == self.parts.n_sub else keep.any(2, keepdim=True)
            wanted = Prepared(self.store.wanted(self.number, index, weight, parts), weight)
        out = self.store.run(
            self.number, x, wanted.entries, low=settled.low, meanwhile=lambda: self.elastic.ahead(self.number + 1, x, index)
        ).to(x.dtype)
        if layer.down_bias is not None:
            bias = layer.down_bias[index.clamp(0, layer.num_experts - 1)]
            out += (bias * (weight * keep.any(2))[:, :, None]).sum(1)
        return out


class StoredElastic(Elastic):
    """`Elastic` over a store: the same points and rules. misses: what happens to slots that would have to be read."""

    def __init__(
        self, model: Any, layer_parts: Sequence[LayerParts], store: RecordStore, *, misses: Misses, ahead: Guess
    ) -> None:
        self.store, self.misses = store, misses
        super().__init__(model, layer_parts)
        self.ahead = ReadAhead(self.layers, store, ahead)

    def executor_of(self, parts: LayerParts) -> Executor:
        return FromStore(parts, self)

    def check(self, point: OperatingPoint) -> None:
        if point.slots.scorer == "oracle":
            raise UsageError("the scorer 'oracle' computes every sub-expert", "load the model without --expert-memory")
        if point.slots.bits is not None:
            self.check_bits(point)
        if point.weights is not None and change_of(point.weights).touches_weights:
            raise UsageError(
                f"the change of weights '{point.weights.change}' needs the experts in memory",
                "load the model without --expert-memory",
            )

    def check_bits(self, point: OperatingPoint) -> None:
        """UsageError for slots of several widths that these records do not hold."""
        raise UsageError(
            "these records hold no slots of several widths", "pack planes: compress --method nested:bits=8 --format records"
        )


def stored_parts(
    layers: Sequence[MoELayer], pack: Pack, n_sub: int, gates: int, tensors: Sequence[dict[str, Tensor]]
) -> list[LayerParts]:
    """Plans over the resident gate neurons. Predictors are float32 from the start: a scorer then needs no copy of them."""
    if any(REPAIR in own for own in tensors):
        raise UsageError("a repaired model has several versions of its experts", "use the folder it was recovered from")
    layer_parts: list[LayerParts] = []
    for layer, own, resident in zip(layers, tensors, pack.resident, strict=True):
        side = {name: t.float() if t.is_floating_point() else t for name, t in own.items()}
        layer_parts.append(LayerParts(StoredNeurons(layer, resident), n_sub, gates, side))
    return layer_parts


def resident_bytes(layer_parts: Sequence[LayerParts]) -> int:
    """What selection keeps in memory: predictors, gate neurons, output biases."""
    tensors = [t for parts in layer_parts for t in (*parts.tensors.values(), *parts.layer.tensors.values())]  # type: ignore[attr-defined]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
