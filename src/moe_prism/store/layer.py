"""A model whose experts are in a store: selection as in memory, from the gate neurons that stay resident; computation by the store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..compress.changes import change_of
from ..elastic import Elastic
from ..elastic.base import LayerParts
from ..elastic.compensate import Compensator
from ..elastic.execute.base import Again, Candidates, Executor, Settled
from ..elastic.select import Selection
from ..elastic.side_tensors import REPAIR
from ..errors import UsageError
from ..model import MoELayer
from ..model.around import LayerAround
from ..model.gate_neurons import GateNeurons
from ..point import OperatingPoint, WeightChange
from .choose_misses import Misses, Prepared, choose
from .one_call import CompiledLayer, StoredAgain, StoredCall, takes_layer
from .pack import Pack
from .read_ahead import Guess, ReadAhead
from .record_store import RecordStore
from .store import ExpertStore
from .token_watch import TokenWatch


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

    def always_selects(self, tokens: int | None = None) -> bool:
        return not self.elastic.misses.is_exact(tokens)

    @property
    def low_bytes(self) -> int | None:
        pack = self.store.pack
        return pack.layout.low_bytes if pack.has_low else None

    @cached_property
    def _layer(self) -> CompiledLayer | None:
        return CompiledLayer(self.parts, self.store) if takes_layer(self.parts, self.store) else None

    @cached_property
    def _everything(self) -> StoredCall | None:
        return None if self._layer is None else StoredCall(self._layer, None, None, self.elastic.ahead)

    def whole(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor | None:
        call = self._everything
        return call(x, index, weight)[0] if call is not None and call.layer.takes(x, index, weight) else None

    def at_once(self, selection: Selection, extra: Compensator | None) -> tuple[Tensor, Tensor] | None:
        """By `one_call`, where everything that is missing is read."""
        call, held = self._call(selection, extra), selection.held
        if call is None or not call.layer.takes(selection.x, selection.index, selection.weight):
            return None
        dials = call.dials(selection)
        if dials is None or (held is not None and held.own is not None):
            return None
        return call(selection.x, selection.index, selection.weight, dials, 0 if held is None else held.past.address)

    def again(self, selection: Selection | None, extra: Compensator | None) -> Again | None:
        """By `one_call`. Other rows may be of another number."""
        if not self.elastic.misses.is_exact():
            return None
        if selection is None:
            return None if self._everything is None else StoredAgain(self._everything, 0, False)
        call = self._call(selection, extra)
        dials = None if call is None or isinstance(selection.budget, Tensor) else call.dials(selection)
        return None if call is None or dials is None else StoredAgain(call, dials, selection.held is not None)

    def _call(self, selection: Selection, extra: Compensator | None) -> StoredCall | None:
        if self._layer is None or not self.elastic.misses.is_exact(len(selection.x)):
            return None
        return self._layer.choice(selection, extra, self.elastic.ahead)

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
        store.reads_ahead = bool(ahead.width)

    @property
    def watch(self) -> TokenWatch | None:
        """What shows a predictor the tokens of a step; None where no predictor looks at them."""
        return None if self.ahead.seen is None else self.ahead.seen.tokens

    def executor_of(self, parts: LayerParts) -> Executor:
        return FromStore(parts, self)

    def source_layers(self) -> Sequence[MoELayer]:
        return [layer.parts.layer.layer for layer in self.layers]  # type: ignore[attr-defined]

    def check(self, point: OperatingPoint) -> None:
        if point.slots.scorer == "oracle":
            raise UsageError("the scorer 'oracle' computes every sub-expert", "load the model without --expert-memory")
        if point.slots.bits is not None:
            self.check_bits(point)
        if point.weights is not None and change_of(point.weights).touches_weights:
            self.check_weights(point.weights)

    def check_weights(self, part: WeightChange) -> None:
        """UsageError for a change of weights that these records do not hold."""
        raise UsageError(
            f"the change of weights '{part.change}' needs the experts in memory", "load the model without --expert-memory"
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
