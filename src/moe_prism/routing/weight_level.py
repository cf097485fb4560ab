"""A level per layer instead of a count: every expert whose routing weight reaches it.

What `batch-redistribution` does with the weights of one batch, done once with those of the calibration text: the layer's n experts per
token on average go to the largest weights. So a token's experts are its own affair, whoever shares its batch. The count holds on average
and on text like the calibration text. It is the level of `elastic.threshold` for whole experts, with the weight alone as their value.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import PlanIndex, RoutingPolicy, mean_kept, ranks
from .plan import SkipPlan


class WeightLevel(RoutingPolicy):
    """Experts of at least the layer's `level`, at most its n; a token always keeps its first."""

    parameters = ("level",)

    def keeps_all(self, plan: int, layer: int, k: int) -> bool:
        return self.column("level").of_plan(plan, layer)[0] <= 0 and super().keeps_all(plan, layer, k)

    def kept(self, ranked: Tensor, layer: int, level: PlanIndex) -> Tensor:
        device, rank = ranked.device, ranks(ranked)
        least = self.column("level").at(layer, level, device)
        return ((ranked >= least) & (rank < self.counts.at(layer, level, device))) | (rank < 1)


def fit_weight_level(counts: Sequence[int], samples: Sequence[Tensor]) -> SkipPlan:
    """The levels at which every layer keeps its count of experts on average over routing weights [S, k] per layer, largest first."""
    levels = tuple((_level(ranked, n),) for ranked, n in zip(samples, counts, strict=True))
    plan = SkipPlan((samples[0].shape[1],) * len(counts), "weight-level", {"level": levels})
    return plan.with_(mean=mean_kept(WeightLevel([plan]), samples))


def _level(ranked: Tensor, n: int) -> float:
    """The smallest of the weights beyond a token's first that n per token leave room for; 0 where n leaves room for all."""
    rest = ranked[:, 1:].flatten().sort(descending=True).values
    room = (n - 1) * len(ranked)
    if room >= len(rest):
        return 0.0
    # half-way to the next smaller one: the plan stores float32, and no weight shall sit on the edge
    return float((rest[room - 1] + rest[room]) / 2) if room else float(rest[0]) * 2 + 1.0
