"""Experts that share one set of weights, the mean of their own, as a change of weights. The router stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...model import MoELayer
from ...schema import check
from ...schema.points import REMAKE, MergeForm
from ..changes import Change
from ..quantize.decoded import encodings_hold
from ..slice.mask import per_neuron
from .groups import MergedExperts

WHERE = "settings of the weight change 'merge'"


@dataclass(frozen=True)
class MergeChange(Change):
    """Of every layer which experts become one. A token that chooses any of them reads the same weights."""

    layers: tuple[MergedExperts, ...]
    name: ClassVar[str] = "merge"
    touches_weights: ClassVar[bool] = True

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> MergeChange:
        rows = check(MergeForm, settings, WHERE, REMAKE).layers
        found = tuple(
            MergedExperts(row.neurons, tuple(row.groups), tuple(row.weights), MergedExperts.orders_of(row.orders, WHERE))
            for row in rows
        )
        for layer in found:
            layer.check(WHERE)
        return cls(found)

    def settings(self) -> dict[str, Any]:
        return {
            "layers": [
                {"neurons": own.neurons, "groups": list(own.groups), "weights": list(own.weights), "orders": own.text}
                for own in self.layers
            ]
        }

    def installed(self, model: Any, layers: Sequence[MoELayer]) -> AbstractContextManager[object]:
        self.check_fits(layers)
        return merged(model, layers, self.layers)

    @property
    def resident_share(self) -> float:
        return sum(len(set(own.groups)) for own in self.layers) / sum(len(own.groups) for own in self.layers)

    def same_weights(self, layers: Sequence[MoELayer], layer: int) -> Tensor:
        self.check_fits(layers)
        return torch.tensor(self.layers[layer].groups)

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        """UsageError for another model."""
        if [(len(own.groups), own.neurons) for own in self.layers] != [(layer.num_experts, layer.width) for layer in layers]:
            raise UsageError("the merged experts are of a model with other experts", REMAKE)


@contextmanager
@torch.no_grad()
def merged(model: Any, layers: Sequence[MoELayer], choices: Sequence[MergedExperts]) -> Iterator[None]:
    """Run a model with merged experts inside the block; the weights are as they were after it, to the bit."""
    changed = [pair for pair in zip(layers, choices, strict=True) if len(set(pair[1].groups)) < len(pair[1].groups)]
    with encodings_hold(model, layers):
        saved = [[view.clone() for view in _views(layer)] for layer, _ in changed]
        try:
            for layer, choice in changed:
                merge(layer, choice)
            yield
        finally:
            for (layer, _), before in zip(changed, saved, strict=True):
                for view, values in zip(_views(layer), before, strict=True):
                    view.copy_(values)


def merge(layer: MoELayer, choice: MergedExperts) -> None:
    """Put the mean of every group into the places of all its experts."""
    orders = choice.order()
    for members in choice.members():
        if len(members) > 1:
            weights = torch.tensor([choice.weights[e] for e in members], dtype=torch.float64)
            weights /= weights.sum()
            for view in _views(layer):
                ordered = [view[e] if view is layer.down_bias else view[e][orders[e].to(view.device)] for e in members]
                mean = sum(float(w) * own.double() for w, own in zip(weights, ordered, strict=True))
                view[members] = torch.as_tensor(mean).to(view)


def _views(layer: MoELayer) -> list[Tensor]:
    """All weights of the experts: those of single neurons, and the output bias."""
    return [*per_neuron(layer), *([] if layer.down_bias is None else [layer.down_bias])]
