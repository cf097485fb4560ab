"""Keep the fewest experts that hold a share of the token's routing weight.

Sigmoid routers push scores towards 0 or 1, so the weight of a low rank may be near that of the first: a rank says little there, the mass
that would be lost says more. Weights that the router normalised or scaled give the same shares as raw scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from ..point import RoutingStage
from .base import SkipStage, VariantIndex, fit_dial, mean_kept, ranks


class ScoreMass(SkipStage):
    """The first ranks whose sum reaches (1 - `epsilon`) of the token's sum, at most the layer's n."""

    neutral_values: ClassVar[Mapping[str, float]] = {"epsilon": 0.0}

    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        device, rank = ranked.device, ranks(ranked)
        sizes = ranked.clamp(min=0).double()
        lost = self.column("epsilon").at(layer, which, device).double()
        wanted = sizes.cumsum(1) - sizes < (1 - lost) * sizes.sum(1, keepdim=True)
        wanted |= lost <= 0  # whatever the rounding of the sums, and experts of weight 0
        return (wanted & (rank < self.counts.at(layer, which, device))) | (rank < 1)


def score_mass(layers: Sequence[int], epsilon: float) -> RoutingStage:
    """One share for all layers. layers: at most so many experts each."""
    return RoutingStage(layers=tuple(layers), stage="score-mass", parameters={"epsilon": ((epsilon,),) * len(layers)})


def fit_score_mass(layers: Sequence[int], samples: Sequence[Tensor], mean: float) -> RoutingStage:
    """The share that keeps `mean` experts per token and layer of routing weights [S, k] per layer, largest first."""
    epsilon = fit_dial(lambda e: mean_kept(ScoreMass([score_mass(layers, e)]), samples), mean)
    return score_mass(layers, epsilon)
