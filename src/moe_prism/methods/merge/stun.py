"""STUN: of experts that are chosen together one stays, then single weights go (arXiv 2409.06211), from its description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...compress.chain import ChainChange
from ...compress.edit import Edit
from ...compress.merge.linkage import FAR, complete_linkage, one_threshold
from ...compress.prune import KeptExperts
from ...compress.prune.change import PruneChange
from ...compress.quantize.decoded import matrices
from ...compress.slice.mask import per_neuron
from ...compress.sparse import SparseChange, SparseLayer
from ...errors import UsageError
from ..neurons.base import FLOOR
from ..neurons.wanda import BAND, OUTLIER
from .base import MergeMethod, MergeParameters, RoutedLayer

BY = ("together", "scores", "random")
SCOPES = ("layer", "model")
NEARLY = 1e-9


@dataclass(frozen=True, kw_only=True)
class StunParameters(MergeParameters):
    """keep: share of the weights that stay, 0: .75 and .5. drop: share of the experts that go, 0: single weights only, which is Wanda.
    by: who is close to whom: experts chosen `together` as published, those with like router `scores`, or a draw (`random`).
    scope: one threshold for the `model` as published, or as many clusters in every `layer`, which files can say.
    owl: whether layers with more outliers keep more.
    """

    drop: float = 0.125
    by: str = "together"
    scope: str = "layer"
    owl: bool = True


class _Settled(NamedTuple):
    kept: tuple[int, ...]
    experts: int
    inputs: Tensor
    middle: Tensor
    outliers: float
    density: float


class Stun(MergeMethod):
    """Experts are clustered so that every two of a cluster are close. Of a cluster the member stays that is nearest to its mean weights,
    with its own row of the router. Then Wanda: of every row of the weights those with the largest |w| x norm of what they read stay.
    """

    needs = ("experts chosen together", "inputs and activations of each expert")
    paper = "arXiv 2409.06211"
    removes = True
    Parameters = StunParameters
    parameters: StunParameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> StunParameters:
        found: StunParameters = super().read_argument(name, text)
        for value, legal, what in ((found.by, BY, "by"), (found.scope, SCOPES, "scope")):
            if value not in legal:
                raise UsageError(f"'{name}' has no {what}={value}", f"choose one of: {', '.join(legal)}")
        if not 0 <= found.drop < 1 or (found.keep and found.keep > 1 - found.drop + NEARLY):
            raise UsageError(f"'{name}' drops more than it may", "keep at most what drop leaves, such as keep=0.5:drop=0.25")
        return found

    @property
    def collectors(self) -> tuple[str, ...]:
        return ("pairs", "inputs", "neurons")

    def experts_share(self, keep: float) -> float:
        return 1 - self.parameters.drop

    def check(self, layers: Sequence[RoutedLayer], keep: float) -> None:
        if keep > 1 - self.parameters.drop + NEARLY:
            raise UsageError(f"'{self.name}' drops more than it may", "keep at most what drop leaves")
        if self.parameters.drop and any(own.groups for own in layers):
            raise UsageError("clusters of experts would leave the router's groups unequal", "write drop=0, or use dern")
        for own in layers:
            if round((1 - self.parameters.drop) * own.layer.num_experts) < own.per_token:
                raise UsageError(
                    f"drop={self.parameters.drop:g} leaves fewer experts than a token uses, {own.per_token}", "drop less"
                )

    def plans(self, layers: Sequence[RoutedLayer], keep: float, protected: Sequence[Tensor]) -> Sequence[tuple[Tensor, float]]:
        self.check(layers, keep)
        distances = [self._distances(own, shield) for own, shield in zip(layers, protected, strict=True)]
        counts = [round((1 - self.parameters.drop) * len(own)) for own in distances]
        least = [max(own.per_token, int(shield.sum()) + 1) for own, shield in zip(layers, protected, strict=True)]
        if any(n < at for n, at in zip(counts, least, strict=True)) and self.parameters.drop:
            raise UsageError("more experts are protected than would stay", "drop less, or protect less")
        if self.parameters.scope == "model":
            counts = one_threshold(distances, sum(counts), least)
        density = min(1.0, keep / (1 - self.parameters.drop))
        return [(complete_linkage(own, n), density) for own, n in zip(distances, counts, strict=True)]

    def _distances(self, own: RoutedLayer, shield: Tensor) -> Tensor:
        """[E, E], in the layer's mean; those of protected experts are FAR."""
        pairs, experts = own.of("pairs"), own.layer.num_experts
        if self.parameters.by == "random":
            draw = torch.rand(experts, experts, generator=torch.Generator().manual_seed(own.layer.index), dtype=torch.float64)
            found = (draw + draw.T) / 2
        elif self.parameters.by == "scores":
            gram = pairs["score_gram"].double()
            if not int(pairs["scored_tokens"]):
                raise UsageError("the router's scores were not seen", "write by=together")
            size = gram.diagonal()
            found = (size[:, None] + size - 2 * gram).clamp(min=0).sqrt()
        else:
            found = -pairs["together"].double()
        apart = ~torch.eye(experts, dtype=torch.bool)
        found = found / found[apart].abs().mean().clamp(min=1e-300)
        found[shield] = found[:, shield] = FAR
        return found

    def settled(self, plan: Any, layer: RoutedLayer) -> _Settled:
        labels, density = plan
        kept = tuple(sorted(_nearest(layer, (labels == c).nonzero().flatten()) for c in torch.unique(labels)))
        inputs, middle = _norms(layer, "inputs"), _norms(layer, "neurons")
        outliers = _outliers(layer, inputs, middle) if self.parameters.owl else 0.0
        return _Settled(kept, layer.layer.num_experts, inputs, middle, outliers, density)

    def edit(self, settled: Sequence[_Settled]) -> Edit:
        shares = _owl([own.outliers for own in settled], settled[0].density)
        rows = [SparseLayer.of(share, own.inputs, own.middle) for share, own in zip(shares, settled, strict=True)]
        kept = tuple(KeptExperts(own.experts, own.kept) for own in settled)
        sparse = SparseChange(tuple(rows))
        return sparse if all(own.is_full for own in kept) else ChainChange((PruneChange(kept), sparse))


def _nearest(layer: RoutedLayer, members: Tensor) -> int:
    """The member whose weights are nearest to the mean of all."""
    if len(members) == 1:
        return int(members[0])
    total = torch.zeros(len(members), dtype=torch.float64)
    for view in per_neuron(layer.layer):
        own = view[members.to(view.device)].double()
        total += (own - own.mean(0)).flatten(1).square().sum(1).cpu()
    return int(members[total.argmin()])


def _norms(layer: RoutedLayer, collector: str) -> Tensor:
    """[E, d] or [E, f]: root mean squares; of an expert with fewer than FLOOR tokens filled up with the layer's mean."""
    found = layer.of(collector)
    total, count = found["sq"].double(), found["count"].double()[:, None]
    lacking = (FLOOR - count).clamp(min=0)
    return ((total + lacking * total.sum(0) / count.sum().clamp(min=1)) / count.clamp(min=FLOOR)).sqrt()


def _outliers(layer: RoutedLayer, inputs: Tensor, middle: Tensor) -> float:
    """The share of a layer's weights whose score is more than OUTLIER times the mean of their matrix."""
    above = count = 0.0
    last = len(matrices(layer.layer)) - 1
    for number, matrix in enumerate(matrices(layer.layer)):
        norms = middle if number == last else inputs
        for e in range(len(matrix)):
            score = matrix[e].detach().float().abs().cpu() * norms[e].float()
            above += float((score > OUTLIER * score.mean()).sum())
            count += score.numel()
    return above / count


def _owl(outliers: Sequence[float], density: float) -> list[float]:
    """The density of every layer, in a band of BAND to both sides, `density` on average."""
    span = max(outliers) - min(outliers)
    if span <= 0:
        return [density] * len(outliers)
    room = min(BAND, density, 1 - density)
    own = [2 * room * (one - min(outliers)) / span for one in outliers]
    return [min(1.0, max(1e-6, density + one - sum(own) / len(own))) for one in own]
