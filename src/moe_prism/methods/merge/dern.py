"""DERN: experts go, and those of their neurons that fit move into the experts that stay (arXiv 2509.10377), from its description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ...compress.merge.cluster import Clustering, Seeds, homes
from ...compress.merge.rehome import RehomeChange, RehomedNeurons
from ...compress.prune import KeptExperts, LayerSubject, PruneRequest, choose, criteria
from ...errors import UsageError
from .base import MergeMethod, MergeParameters, RoutedLayer


@dataclass(frozen=True, kw_only=True)
class DernParameters(MergeParameters):
    """threshold: cosine from which on a neuron moves, below it goes. seeds: what clusters begin with: neurons with the largest entry in
    their row of `gate` as published, the expert's `own`, or a `random` draw. gate: whether rows of gate count in the cosine. weighted:
    whether a neuron counts by its expert's score. by: criterion that says which experts stay.
    """

    threshold: float = 0.5
    seeds: str = "gate"
    gate: bool = False
    weighted: bool = True
    by: str = "soft-selected"


class Dern(MergeMethod):
    """Experts stay by the sum of their routing weights. Every neuron of the others joins the expert that owns the most similar one, from a
    cosine on. There spherical k-means makes them as many again as before; a mean has the mean length. Router rows go as with pruning.
    """

    needs = ("how often each expert is chosen",)
    paper = "arXiv 2509.10377"
    removes = True
    Parameters = DernParameters
    parameters: DernParameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> DernParameters:
        found: DernParameters = super().read_argument(name, text)
        if found.seeds not in get_args(Seeds):
            raise UsageError(f"'{name}' has no seeds={found.seeds}", f"choose one of: {', '.join(get_args(Seeds))}")
        if not -1 <= found.threshold <= 1:
            raise UsageError(f"threshold={found.threshold:g} of '{name}' is no cosine", "write threshold=0.5")
        if criteria.get(found.by).is_blind:
            raise UsageError(f"'{found.by}' of '{name}' gives neurons no weights", "write by=soft-selected, as published")
        return found

    @property
    def collectors(self) -> tuple[str, ...]:
        return criteria.get(self.parameters.by).needs

    def check(self, layers: Sequence[RoutedLayer], keep: float) -> None:
        nothing = [torch.zeros(own.layer.num_experts) for own in layers]
        chosen(layers, keep, nothing, [scores.bool() for scores in nothing])

    def plans(
        self, layers: Sequence[RoutedLayer], keep: float, protected: Sequence[Tensor]
    ) -> Sequence[tuple[KeptExperts, Tensor]]:
        criterion = criteria.get(self.parameters.by)()
        scores = []
        for (layer, values, per_token, _), shield in zip(layers, protected, strict=True):
            subject = LayerSubject(layer.index, layer.name, layer.num_experts, per_token, values, shield)
            scores.append(criterion.scores(subject).double())
        return list(zip(chosen(layers, keep, scores, protected), scores, strict=True))

    def settled(self, plan: Any, layer: RoutedLayer) -> RehomedNeurons:
        choice, scores = plan
        asked = self.parameters
        weights = scores.clamp(min=0) if asked.weighted else torch.ones_like(scores)
        how = Clustering(asked.threshold, asked.seeds, asked.gate)  # type: ignore[arg-type]
        return RehomedNeurons.of(choice, weights, homes(layer.layer, choice.kept, weights, how))

    def edit(self, settled: Sequence[RehomedNeurons]) -> RehomeChange:
        return RehomeChange(tuple(settled))


def chosen(
    layers: Sequence[RoutedLayer], keep: float, scores: Sequence[Tensor], protected: Sequence[Tensor]
) -> list[KeptExperts]:
    """Who stays, as many in every layer. UsageError where that leaves too few."""
    return choose(scores, PruneRequest(keep), layers[0].per_token, protected, [own.groups for own in layers])
