"""Experts that share one set of weights, the mean of their own, as a change of weights. The router stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...model import MoELayer
from ...schema import check
from ...schema.points import REMAKE, MergeForm
from ..edit import Edit, expert_views
from .groups import MergedExperts

WHERE = "settings of the weight change 'merge'"


@dataclass(frozen=True)
class MergeChange(Edit):
    """Of every layer which experts become one. A token that chooses any of them reads the same weights."""

    layers: tuple[MergedExperts, ...]
    name: ClassVar[str] = "merge"

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

    @property
    def resident_share(self) -> float:
        return sum(len(set(own.groups)) for own in self.layers) / sum(len(own.groups) for own in self.layers)

    def same_weights(self, layers: Sequence[MoELayer], layer: int) -> Tensor:
        self.check_fits(layers)
        return torch.tensor(self.layers[layer].groups)

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        if [(len(own.groups), own.neurons) for own in self.layers] != [(layer.num_experts, layer.width) for layer in layers]:
            raise UsageError("the merged experts are of a model with other experts", REMAKE)

    def changes(self, number: int) -> bool:
        return len(set(self.layers[number].groups)) < len(self.layers[number].groups)

    def edit(self, number: int, layer: MoELayer) -> None:
        merge(layer, self.layers[number])


@torch.no_grad()
def merge(layer: MoELayer, choice: MergedExperts) -> None:
    """Put the mean of every group into the places of all its experts."""
    orders = choice.order()
    for members in choice.members():
        if len(members) > 1:
            weights = torch.tensor([choice.weights[e] for e in members], dtype=torch.float64)
            weights /= weights.sum()
            for view in expert_views(layer):
                whole = layer.down_bias is not None and view.data_ptr() == layer.down_bias.data_ptr()
                ordered = [view[e] if whole else view[e][orders[e].to(view.device)] for e in members]
                mean = sum(float(w) * own.double() for w, own in zip(weights, ordered, strict=True))
                view[members] = torch.as_tensor(mean).to(view)
