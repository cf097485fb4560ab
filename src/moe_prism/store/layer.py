"""A model whose experts are in a store: selection as in memory, from the gate neurons that stay resident; computation by the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..elastic import Elastic
from ..elastic.base import LayerParts, Scorer, Slots
from ..elastic.repair import REPAIR
from ..elastic.runtime import ElasticLayer, Setting
from ..errors import UsageError
from ..model import MoELayer
from ..model.base import ExpertsFn
from .choose_misses import Misses, SlotChoice, choose, choose_few
from .pack import Pack
from .read_ahead import Ahead
from .store import ExpertStore


class GateNeurons(MoELayer):
    """The part of a layer that stays in memory: the N r gate neurons of every expert, and the biases of its output."""

    def __init__(self, layer: MoELayer, tensors: dict[str, Tensor]) -> None:
        self.layer, self.full_width = layer, layer.width
        self.name, self.module, self.index = layer.name, layer.module, layer.index
        self.num_experts, self.hidden = layer.num_experts, layer.hidden
        self.tensors = {name: t.float() for name, t in tensors.items()}
        self.width = self.up.shape[1]

    @property
    def gate(self) -> Tensor | None:
        return self.tensors.get("gate")

    @property
    def up(self) -> Tensor:
        return self.tensors["up"]

    @property
    def down(self) -> Tensor:
        return self.tensors["down"].transpose(1, 2)

    @property
    def gate_bias(self) -> Tensor | None:
        return self.tensors.get("gate_bias")

    @property
    def up_bias(self) -> Tensor | None:
        return self.tensors.get("up_bias")

    @property
    def down_bias(self) -> Tensor | None:
        return self.tensors.get("down_bias")

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self.layer.activate(gate, up)

    def activate_joined(self, both: Tensor) -> Tensor:
        return self.layer.activate_joined(both)

    def install(self, function: ExpertsFn) -> None:
        self.layer.install(function)

    def uninstall(self) -> None:
        self.layer.uninstall()

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError("the experts of this layer are not in memory")

    def storage(self) -> tuple[int, ...]:
        return (self.up.data_ptr(),)

    def parameters_per_expert(self) -> int:
        matrices = 3 if self.gate is not None else 2
        biases = (matrices - 1) * self.full_width if self.up_bias is not None else 0
        return matrices * self.hidden * self.full_width + biases + (self.hidden if self.down_bias is not None else 0)


class StoredLayer(ElasticLayer):
    """One layer: selects as an in-memory one would, and has the store compute."""

    def __init__(self, plan: LayerParts, elastic: StoredElastic, number: int) -> None:
        super().__init__(plan, elastic)
        self.elastic: StoredElastic = elastic
        self.store, self.number = elastic.store, number

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        setting, misses = self.elastic.setting, self.elastic.misses
        layer = self.plan.layer
        full = setting.is_full(layer.index) and not self.elastic.always_split and misses.is_exact
        found = None if full else choose_few(self, x, index, weight, setting, misses)
        if found is None:
            valid = index.clamp(0, layer.num_experts - 1) == index
            every = valid[:, :, None].expand(-1, -1, self.plan.n_sub)
            found = SlotChoice(every) if full else choose(self, self.slots(x, index, weight, valid, setting), setting, misses)
        keep = found.keep
        self._count(index, None if full else keep)
        extra = None if full else self.compensation(setting)
        weights = weight if extra is None else extra.weights(index, weight, keep)

        def meanwhile() -> None:
            self.elastic.ahead(self.number + 1, x)

        wanted = found.wanted if weights is weight else None
        if wanted is None:
            wanted = self.store.wanted(self.number, index, weights, self._parts(keep))
        out = self.store.run(self.number, x, wanted, low=found.low, meanwhile=meanwhile).to(x.dtype)
        if layer.down_bias is not None:
            bias = layer.down_bias[index.clamp(0, layer.num_experts - 1)]
            out += (bias * (weights * keep.any(2))[:, :, None]).sum(1)
        return out if extra is None else out + extra(x, index, weight, keep).to(out.dtype)

    def slots(self, x: Tensor, index: Tensor, weight: Tensor, valid: Tensor, setting: Setting) -> Slots:
        """The candidate slots of a batch, as `select` makes them."""
        experts = self.plan.layer.num_experts

        def norms() -> Tensor:
            return self.scorer(setting.scorer)(x, index.clamp(0, experts - 1))

        return Slots(x, index, weight, valid, self.plan.n_sub, norms)

    def _parts(self, keep: Tensor) -> Tensor:
        """keep of the store's parts: whole experts where it holds whole ones."""
        return keep if self.store.space.parts == self.plan.n_sub else keep.any(2, keepdim=True)

    def scorer(self, name: str) -> Scorer:
        if name == "oracle":
            raise UsageError("the scorer 'oracle' computes every sub-expert", "load the model without --expert-memory")
        return super().scorer(name)


class StoredElastic(Elastic):
    """`Elastic` over a store: the same settings and rules. `misses`: what happens to slots that would have to be read."""

    def __init__(
        self, model: Any, plans: Sequence[LayerParts], store: ExpertStore, bytes_per_weight: int, misses: Misses, ahead: int
    ) -> None:
        """ahead: records to read ahead of a layer at most."""
        self.model, self.store, self.misses = model, store, misses
        self.setting = Setting()
        self.always_split = False
        self.counting = False
        self.stored_bytes_per_weight = bytes_per_weight
        self.stored = [StoredLayer(plan, self, number) for number, plan in enumerate(plans)]
        self.layers = list(self.stored)
        self.ahead = Ahead(self, ahead)
        for layer in self.layers:
            layer.plan.layer.install(layer)


def stored_plans(
    layers: Sequence[MoELayer], pack: Pack, n_sub: int, gates: int, tensors: Sequence[dict[str, Tensor]]
) -> list[LayerParts]:
    """Plans over the resident gate neurons. Predictors are float32 from the start: a scorer then needs no copy of them."""
    if any(REPAIR in own for own in tensors):
        raise UsageError("a repaired model has several versions of its experts", "use the folder it was recovered from")
    plans: list[LayerParts] = []
    for layer, own, resident in zip(layers, tensors, pack.resident, strict=True):
        side = {name: t.float() if t.is_floating_point() else t for name, t in own.items()}
        plans.append(LayerParts(GateNeurons(layer, resident), n_sub, gates, side))
    return plans


def resident_bytes(plans: Sequence[LayerParts]) -> int:
    """What selection keeps in memory: predictors, gate neurons, output biases."""
    tensors = [t for plan in plans for t in (*plan.tensors.values(), *plan.layer.tensors.values())]  # type: ignore[attr-defined]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
