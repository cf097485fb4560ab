"""Experts that are not there any more, and whose neurons went on in others, as a change of weights. Shapes: E experts, f neurons each."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import CorruptError, UsageError
from ...model import MoELayer
from ...schema import check
from ...schema.points import REMAKE, RehomeForm
from ..edit import Edit
from ..prune.change import kept_experts
from ..prune.choice import KeptExperts
from ..slice.mask import per_neuron

WHERE = "settings of the weight change 'rehome'"


@dataclass(frozen=True)
class RehomedNeurons:
    """choice: the experts that stay. weights: of every expert, what its neurons count in a mean. places: for every neuron the place, expert
    * f + neuron, of the mean that it is part of, -1: it goes; [E, f] little-endian numbers of 32 bits.
    """

    neurons: int
    choice: KeptExperts
    weights: tuple[float, ...]
    places: bytes

    @classmethod
    def of(cls, choice: KeptExperts, weights: Tensor, places: Tensor) -> RehomedNeurons:
        """places [E, f]."""
        return cls(places.shape[1], choice, tuple(weights.tolist()), places.numpy().astype("<i4").tobytes())

    @property
    def text(self) -> str:
        """The places as base64, for JSON."""
        return base64.b64encode(self.places).decode()

    def homes(self) -> Tensor:
        """[E, f]."""
        return torch.from_numpy(np.frombuffer(self.places, "<i4").astype(np.int64)).view(-1, self.neurons)

    def check(self, where: str) -> None:
        """CorruptError for places that are none, are nobody's, or lie in an expert that is not there."""
        experts = self.choice.experts
        if len(self.weights) != experts or len(self.places) != 4 * experts * self.neurons:
            raise CorruptError(f"{where}: the places of a layer's neurons are not those of {experts} experts", REMAKE)
        found = self.homes()
        wanted = [e * self.neurons + j for e in self.choice.kept for j in range(self.neurons)]
        if sorted(set(found.flatten().tolist()) - {-1}) != wanted:
            raise CorruptError(f"{where}: neurons went to places that are not there, or left some empty", REMAKE)


@dataclass(frozen=True)
class RehomeChange(Edit):
    """Fewer experts of the same width. The router loses the rows of those that go, as with pruning."""

    layers: tuple[RehomedNeurons, ...]
    name: ClassVar[str] = "rehome"

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> RehomeChange:
        found = []
        for row in check(RehomeForm, settings, WHERE, REMAKE).layers:
            try:
                places = base64.b64decode(row.places, validate=True)
            except ValueError as error:
                raise CorruptError(f"{WHERE}: the places of a layer's neurons are no base64", REMAKE) from error
            found.append(RehomedNeurons(row.neurons, kept_experts(row, WHERE), tuple(row.weights), places))
            found[-1].check(WHERE)
        return cls(tuple(found))

    def settings(self) -> dict[str, Any]:
        return {
            "layers": [
                {
                    "experts": own.choice.experts,
                    "kept": list(own.choice.kept),
                    "groups": own.choice.groups and asdict(own.choice.groups),
                    "neurons": own.neurons,
                    "weights": list(own.weights),
                    "places": own.text,
                }
                for own in self.layers
            ]
        }

    @property
    def staying(self) -> tuple[KeptExperts, ...]:
        return tuple(own.choice for own in self.layers)

    @property
    def resident_share(self) -> float:
        return sum(len(c.kept) for c in self.staying) / sum(c.experts for c in self.staying)

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        mine = [(own.choice.experts, own.neurons) for own in self.layers]
        if mine != [(layer.num_experts, layer.width) for layer in layers]:
            raise UsageError("the neurons that moved are of a model with other experts", REMAKE)

    def changes(self, number: int) -> bool:
        own, (experts, size) = self.layers[number], (self.layers[number].choice.experts, self.layers[number].neurons)
        stays = torch.arange(experts * size).view(experts, size)
        stays[list(own.choice.gone)] = -1
        return not torch.equal(own.homes(), stays)

    @torch.no_grad()
    def edit(self, number: int, layer: MoELayer) -> None:
        own = self.layers[number]
        found, size = own.homes(), own.neurons
        for e in own.choice.kept:
            expert, neuron = torch.where(found // size == e)  # -1 // f is -1, nobody's
            place = found[expert, neuron] - e * size
            alone = torch.bincount(place, minlength=size) == 1
            order = place.argsort(stable=True)
            weights = torch.tensor(own.weights, dtype=torch.float64)[expert]
            for view in per_neuron(layer):
                rows = view[expert.to(view.device), neuron.to(view.device)].cpu()
                new = _means(rows.double(), weights, place, size).to(rows.dtype)
                new[alone] = rows[order][_first(place[order])][alone]  # what met nobody stays to the bit
                view[e] = new.to(view.device)


def _means(rows: Tensor, weights: Tensor, place: Tensor, size: int) -> Tensor:
    """[f, d] or of biases [f]: the weighted mean direction of every place's rows, at their weighted mean length.

    Where all weights are 0, every row counts alike.
    """
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, place, weights)
    share = torch.where(sums[place] > 0, weights, 1.0)
    share = share / torch.zeros(size, dtype=torch.float64).index_add_(0, place, share)[place]
    if rows.ndim == 1:
        return torch.zeros(size, dtype=torch.float64).index_add_(0, place, rows * share)
    lengths = torch.zeros(size, dtype=torch.float64).index_add_(0, place, rows.norm(dim=1) * share)
    units = nn.functional.normalize(rows, dim=1) * share[:, None]
    directions = torch.zeros(size, rows.shape[1], dtype=torch.float64).index_add_(0, place, units)
    return nn.functional.normalize(directions, dim=1) * lengths[:, None]


def _first(ranked: Tensor) -> Tensor:
    """[f]: where the rows of every place begin. ranked: places, rising, each there at least once."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(ranked).cumsum(0)[:-1]])
