"""A cutoff per layer instead of a count: every expert whose routing weight reaches it.

What `batch-redistribution` does with the weights of one batch, done once with those of the calibration text: the layer's n experts per
token on average go to the largest weights. So a token's experts are its own affair, whoever shares its batch. The count holds on average
and on text like the calibration text. It is the cutoff of the `threshold` rule for whole experts, with the weight alone as their value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ..point import RoutingStage
from .base import SkipStage, VariantIndex, ranks


class WeightCutoff(SkipStage):
    """Experts of at least the layer's `cutoff`, at most its n; a token always keeps its first."""

    neutral_values: ClassVar[Mapping[str, float]] = {"cutoff": 0.0}

    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        device, rank = ranked.device, ranks(ranked)
        least = self.column("cutoff").at(layer, which, device)
        return ((ranked >= least) & (rank < self.counts.at(layer, which, device))) | (rank < 1)


def fit_weight_cutoff(counts: Sequence[int], samples: Sequence[Tensor]) -> RoutingStage:
    """The cutoffs at which every layer keeps its count of experts on average over routing weights [S, k] per layer, largest first."""
    cutoffs = tuple((_cutoff(ranked, n),) for ranked, n in zip(samples, counts, strict=True))
    most = samples[0].shape[1]
    return RoutingStage(layers=(most,) * len(counts), stage="weight-cutoff", parameters={"cutoff": cutoffs})


def _cutoff(ranked: Tensor, n: int) -> float:
    """The smallest of the weights beyond a token's first that n per token leave room for; 0 where n leaves room for all."""
    rest = ranked[:, 1:].flatten().sort(descending=True).values
    room = (n - 1) * len(ranked)
    if room >= len(rest):
        return 0.0
    # half-way to the next smaller one: the plan stores float32, and no weight shall sit on the edge
    return float((rest[room - 1] + rest[room]) / 2) if room else float(rest[0]) * 2 + 1.0
