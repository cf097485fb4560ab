"""Skip the experts of a token that are small beside its largest.

- SER (ik_llama.cpp, pull request 239): keep rank j while w_j >= t w_1, and the first K_min (`least`) always.
- NAEE (arXiv 2402.14800, section 3.3): skip the second expert where w_2 < b w_1, b the median of w_2 / w_1 over calibration tokens of the
  layer. For k > 2, which the paper leaves open, every rank has its own b, and the quantile is a dial (0.5 is the paper's median).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..point import RoutingStage
from ..point.slots import Numbers
from .base import SkipStage, VariantIndex, fit_dial, mean_kept, ranks


class TokenThreshold(SkipStage):
    """Ranks 1, 2, ... while each holds at least `t` of the largest weight, at least `least` of them and at most the layer's n."""

    neutral_values: ClassVar[Mapping[str, float]] = {"t": 0.0, "least": 1.0}

    def keeps_all(self, variant: int, layer: int, k: int) -> bool:
        passes = max(self.column("t").of_variant(variant, layer)) <= 0 or self.column("least").of_variant(variant, layer)[0] >= k
        return passes and self.counts.of_variant(variant, layer)[0] >= k

    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        device, rank = ranked.device, ranks(ranked)
        share = self.column("t").at(layer, which, device)
        passed = (ranked >= share * ranked[:, :1]).long().cumprod(1).bool()
        passed |= rank < self.column("least").at(layer, which, device)
        return (passed & (rank < self.counts.at(layer, which, device))) | (rank < 1)


def ser(layers: Sequence[int], t: float, least: int = 1) -> RoutingStage:
    """One threshold for all layers. layers: at most so many experts each."""
    many = len(layers)
    return RoutingStage(
        layers=tuple(layers), stage="token-threshold", parameters={"t": ((t,),) * many, "least": ((float(least),),) * many}
    )


def naee(layers: Sequence[int], samples: Sequence[Tensor], quantile: float = 0.5) -> RoutingStage:
    """Thresholds per layer and rank: the quantile of w_j / w_1 over samples [S, k] per layer, largest first."""
    t: Numbers = tuple((0.0, *_quantiles(ranked, quantile)) for ranked in samples)
    return RoutingStage(layers=tuple(layers), stage="token-threshold", parameters={"t": t, "least": ((1.0,),) * len(layers)})


def _quantiles(ranked: Tensor, quantile: float) -> list[float]:
    """Of w_j / w_1 for ranks 2..k; the value itself, not an interpolation, so that it is a ratio that occurs."""
    ratio = (ranked[:, 1:].clamp(min=0) / ranked[:, :1].clamp(min=torch.finfo(torch.float32).tiny)).sort(0).values
    return ratio[min(round(quantile * len(ratio)), len(ratio) - 1)].tolist()


def fit_ser(layers: Sequence[int], samples: Sequence[Tensor], mean: float, least: int = 1) -> RoutingStage:
    """SER with the threshold that keeps `mean` experts per token and layer of the samples."""
    t = fit_dial(lambda t: mean_kept(TokenThreshold([ser(layers, t, least)]), samples), mean)
    return ser(layers, t, least)


def fit_naee(layers: Sequence[int], samples: Sequence[Tensor], mean: float | None = None) -> RoutingStage:
    """NAEE at its median, or at the quantile that keeps `mean` experts per token and layer of the samples."""
    quantile = 0.5
    if mean is not None:
        quantile = fit_dial(lambda q: mean_kept(TokenThreshold([naee(layers, samples, q)]), samples), mean)
    return naee(layers, samples, quantile)
