"""ODP (MC-MoE, arXiv 2410.06270): experts that are small beside their token's largest go, but not in every layer nor of every token.

In a layer that may be pruned a token keeps rank j while w_j >= t w_1, and its first `least` ranks always; t is a quantile of w_j / w_1 over
the calibration text, for k = 2 the paper's rule. Tokens of large importance keep everything. The paper multiplies the L1 norm of a
token's hidden state by the attention that it receives, which later tokens decide. Here only the norm counts, so that no token waits for
another. Layers whose own loss is largest are left whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...point import RoutingStage
from ...routing.base import Routed, VariantIndex, fit_dial
from ...routing.token_threshold import TokenThreshold
from ..base import Subject
from .base import Fitted, SkipMethod, all_experts, calibration_facts, given
from .profile import profile, samples, views

LAYERS, GUARD = 0.67, 0.02


def importance(routed: Routed) -> Tensor:
    """[T]: the L1 norm of the layer's input."""
    return routed.x.float().abs().sum(1)


class OdpStage(TokenThreshold):
    """`token-threshold`, and tokens whose importance reaches the layer's `guard` keep everything; 0: there are none."""

    paper = "arXiv 2410.06270"
    neutral_values: ClassVar[Mapping[str, float]] = {"t": 0.0, "least": 1.0, "guard": 0.0}

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        after = super().route(routed, which)
        guard = self.column("guard").at(routed.layer, which, routed.x.device)[..., :1].reshape(-1)
        spared = ((importance(routed) >= guard) & (guard > 0))[:, None]
        index, weight = (torch.where(spared, a, b) for a, b in ((routed.index, after.index), (routed.weight, after.weight)))
        return replace(routed, index=index, weight=weight)


@dataclass(frozen=True, kw_only=True)
class OdpParameters:
    """layers: share of the layers that are pruned; guard: share of the tokens that keep everything; least: experts always computed."""

    layers: float = LAYERS
    guard: float = GUARD
    least: int = 1


class Odp(SkipMethod):
    """`odp:LAYERS`: experts below a quantile beside the token's largest, in a share of the layers, except for a share of the tokens."""

    needs = ("routing weights", "calibration text")
    paper = "arXiv 2410.06270"
    stage: ClassVar[type[OdpStage]] = OdpStage
    Parameters = OdpParameters
    parameters: OdpParameters

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        mean, weights = given(self.name, mean), samples(subject)
        pruned = self._pruned(subject)
        norms = views(subject, "importance", importance)
        guards = [_upper(values, self.parameters.guard) for values in norms]
        spared = [(values >= guard) & (guard > 0) for values, guard in zip(norms, guards, strict=True)]

        def made(quantile: float) -> RoutingStage:
            t = tuple((_quantile(own, quantile) if i in pruned else 0.0,) for i, own in enumerate(weights))
            parameters = {"t": t, "least": ((float(self.parameters.least),),) * len(t), "guard": tuple((g,) for g in guards)}
            return RoutingStage(layers=all_experts(subject), stage="odp", parameters=parameters)

        def mean_at(quantile: float) -> float:
            kept = _kept(made(quantile), weights, spared)
            return sum(kept) / len(kept)

        quantile = fit_dial(mean_at, mean)
        kept = _kept(made(quantile), weights, spared)
        facts = {"quantile": quantile, "pruned_layers": sorted(pruned), "layer_means": [round(m, 4) for m in kept]}
        return Fitted(made(quantile), sum(kept) / len(kept), {**facts, **calibration_facts(subject)})

    def means(self, subject: Subject) -> Sequence[float | None]:
        """As many as there would be down to 1, down to what the layers that are pruned can reach."""
        share = (1 - self.parameters.guard) * self._count(subject) / subject.layers
        least = self.parameters.least
        found = [mean for mean in super().means(subject) if mean is not None]
        return [
            subject.k - (subject.k - mean) * share * (subject.k - least) / (subject.k - 1) for mean in found if least < subject.k
        ]

    def _count(self, subject: Subject) -> int:
        shares = self.parameters.layers, self.parameters.guard
        if not (0 < shares[0] <= 1 and 0 <= shares[1] < 1 and 1 <= self.parameters.least <= subject.k):
            raise UsageError(
                f"'{self.name}' is outside what odp takes", f"give layers in (0, 1], guard in [0, 1), least 1 to {subject.k}"
            )
        return max(1, round(shares[0] * subject.layers))

    def _pruned(self, subject: Subject) -> set[int]:
        """The layers that lose least with half of their experts."""
        own = [losses[max(0, (subject.k + 1) // 2 - 1)] for losses in profile(subject)]
        return set(sorted(range(len(own)), key=lambda i: (own[i], i))[: self._count(subject)])


def _kept(stage: RoutingStage, rows: Sequence[Tensor], spared: Sequence[Tensor]) -> list[float]:
    """Experts per token of every layer."""
    made = OdpStage([stage])
    return [float((made.kept(own, i, 0) | spared[i][:, None]).sum(1).double().mean()) for i, own in enumerate(rows)]


def _quantile(ranked: Tensor, quantile: float) -> float:
    """Of w_j / w_1 over ranks from 2 on; a value that occurs."""
    tiny = torch.finfo(torch.float32).tiny
    ratio = (ranked[:, 1:].clamp(min=0) / ranked[:, :1].clamp(min=tiny)).flatten().sort().values
    place = round(quantile * len(ratio))
    return float(ratio[place]) if place < len(ratio) else 1.0 + 1e-6


def _upper(values: Tensor, share: float) -> float:
    """What a share of the values reaches; 0 for none of them."""
    count = round(share * len(values))
    return float(values.sort(descending=True).values[count - 1]) if count else 0.0
