"""Dynamic top-p (Harder Tasks Need More Experts, arXiv 2403.07652), without training: the fewest of all experts that hold a share.

Experts are sorted by the router's probability over all E, and the shortest prefix whose sum exceeds the layer's `p` is taken, the expert
that crosses it included. So a token may take more experts than the router's k, up to the layer's n. A weight is the probability times what
the router made of the probabilities of its own choice, for most routers 1; with `keep_mass` the weights add up to what the router's did.
The paper has one p and trains with it; here every layer's is calibrated to a mean. Shapes: T tokens, E experts, S samples, n taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from ...point import RoutingStage
from ...routing.base import Routed, Stage, VariantIndex
from ..base import Subject
from .base import Fitted, SkipMethod, calibration_facts, given
from .profile import scores

OFF = -1.0  # up to here the router's own choice stands; 0 is its first expert


class TopP(Stage):
    """At least one expert and at most the layer's n, of all that the router scores."""

    neutral_values: ClassVar[Mapping[str, float]] = {"p": OFF}
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    adds: ClassVar[bool] = True

    def keeps_all(self, variant: int, layer: int, k: int) -> bool:
        return self.column("p").of_variant(variant, layer)[0] <= OFF

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        layer, device = routed.layer, routed.x.device
        scores = routed.scores()[:, : routed.experts]
        most = min(routed.experts, max(int(max(v.layers)) for v in self.variants))
        values, index = scores.sort(dim=1, descending=True, stable=True)
        values, index = values[:, :most], index[:, :most]
        keep = reaches(values, self.column("p").at(layer, which, device))
        keep &= torch.arange(most, device=device) < self.counts.at(layer, which, device)
        keep[:, 0] = True
        weight = router_weights(routed, scores, values.masked_fill(~keep, 0.0), self.keep_mass)
        after = replace(routed, index=index.masked_fill(~keep, -1), weight=weight.to(routed.weight.dtype))
        if isinstance(which, int):
            return after
        return where_off(routed, after, self.column("p").at(layer, which, device)[:, :1] <= OFF)


def router_weights(routed: Routed, scores: Tensor, kept: Tensor, keep_mass: bool) -> Tensor:
    """The router's own weights of these probabilities kept [T, n]. scores [T, E]: what its own choice is of."""
    chosen = (routed.index >= 0) & (routed.index < routed.experts)
    size = routed.weight.float().masked_fill(~chosen, 0.0).sum(1, keepdim=True)
    held = scores.gather(1, routed.index.clamp(0, routed.experts - 1)).masked_fill(~chosen, 0.0).sum(1, keepdim=True)
    base = kept.sum(1, keepdim=True) if keep_mass else held
    return kept * (size / base.clamp(min=torch.finfo(torch.float32).tiny))


def where_off(routed: Routed, after: Routed, off: Tensor) -> Routed:
    """Tokens whose variant is off [T, 1] keep the router's choice, beside others that do not."""
    width = max(routed.index.shape[1], after.index.shape[1])
    pairs = [(_padded(routed.index, width, -1), _padded(after.index, width, -1))]
    pairs += [(_padded(routed.weight, width, 0), _padded(after.weight, width, 0))]
    index, weight = (torch.where(off, own, new) for own, new in pairs)
    return replace(routed, index=index, weight=weight)


def reaches(values: Tensor, p: Tensor) -> Tensor:
    """[S, n] bool: the shortest prefix of values [S, n], largest first, whose sum exceeds p."""
    return values.double().cumsum(1) - values <= p.double()


def _padded(rows: Tensor, width: int, value: float) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=value)


def fit_top_p(samples: Sequence[Tensor], mean: float, most: int) -> RoutingStage:
    """The p of every layer at which its mean is `mean` experts, at most `most` per token. samples [S, E] per layer, largest first."""
    shares = tuple((_share(ranked[:, :most], mean),) for ranked in samples)
    return RoutingStage(layers=(most,) * len(samples), stage="top-p", parameters={"p": shares})


def mean_of(ranked: Tensor, p: float, most: int) -> float:
    """Experts per token at p."""
    taken = reaches(ranked[:, :most], torch.tensor([[p]]))
    taken[:, 0] = True
    return float(taken.sum(1).double().mean())


def _share(ranked: Tensor, mean: float) -> float:
    """By halving: the smallest p, to float32, at which so many are taken."""
    low, high = 0.0, float(ranked.sum(1).max())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of(ranked, middle, ranked.shape[1]) < mean else (low, middle)
    return high


@dataclass(frozen=True, kw_only=True)
class TopPParameters:
    """most: experts that a token may take; 0: twice the model's k."""

    most: int = 0


class TopPMethod(SkipMethod):
    """`top-p:MOST`: the fewest of all experts that hold a layer's share of the probability, a token at most MOST (2 k)."""

    needs = ("router probabilities",)
    paper = "arXiv 2403.07652"
    stage: ClassVar[type[TopP]] = TopP
    Parameters = TopPParameters
    parameters: TopPParameters

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        mean, found = given(self.name, mean), scores(subject)
        most = min(self.parameters.most or 2 * subject.k, found[0].shape[1])
        stage = fit_top_p(found, mean, most)
        means = [mean_of(own, row[0], most) for own, row in zip(found, stage.parameters["p"], strict=True)]
        return Fitted(stage, fmean(means), {"layer_means": [round(m, 4) for m in means], **calibration_facts(subject)})

    def means(self, subject: Subject) -> Sequence[float | None]:
        return [m for m in super().means(subject) if m is not None and m > 1]
