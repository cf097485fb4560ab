"""Self-contrast (SCMoE, arXiv 2405.14507): what strong routing says and weak routing does not.

Every token takes two forwards, each with a cache of its own: the point, and the same model with weak routing. With their logits s and w,
s + beta (s - w) is drawn from, over the tokens that s gives at least alpha times the probability of its likeliest. That is (1 + beta) s -
beta w; written so, equal routings give s to the bit. The paper's weak routing is the expert of rank 2 alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ...elastic.runtime import Elastic
from ...errors import UsageError
from ...point import OperatingPoint, RoutingStage
from .base import Decoded, DecodeMethod, DecodeRun, Steps, at_budget, refuse_held


@dataclass(frozen=True, kw_only=True)
class ScmoeParameters:
    """beta: weight of the contrast. alpha: least share of the likeliest token's probability. rank: the weak forward's one expert, from 1.

    budget: the weak forward reads this share of the bytes instead; 0: it goes by rank; 1: it is the strong one.
    """

    beta: float = 0.5
    alpha: float = 0.1
    rank: int = 2
    budget: float = 0.0


class Scmoe(DecodeMethod):
    """`scmoe:BETA`, `scmoe:beta=0.5:alpha=0.1:rank=2`."""

    needs = ()
    paper = "arXiv 2405.14507"
    served_by = "generate, serve --decoding"
    neutral: ClassVar[Mapping[str, Any]] = {"beta": 0.0}
    Parameters = ScmoeParameters
    parameters: ScmoeParameters

    def __init__(self, name: str, parameters: ScmoeParameters) -> None:
        super().__init__(name, parameters)
        if not 0 <= parameters.beta < math.inf:
            raise UsageError(f"the contrast has weight {parameters.beta:g}", "give 0 or more; the paper tries 0.1 to 0.9")
        if not 0 < parameters.alpha <= 1:
            raise UsageError(f"alpha {parameters.alpha:g} is outside (0, 1]", "0.1 is the paper's")
        if not 0 <= parameters.budget <= 1:
            raise UsageError(f"the weak budget {parameters.budget:g} is outside [0, 1]", "0 goes by rank")
        if parameters.rank < 1:
            raise UsageError(f"there is no expert of rank {parameters.rank}", "ranks begin at 1")

    @classmethod
    def example(cls) -> str | None:
        return "0.5"

    def check(self, elastic: Elastic, point: OperatingPoint) -> None:
        refuse_held(elastic, point, "scmoe")
        if not self.parameters.budget and elastic.k is not None and self.parameters.rank > elastic.k:
            raise UsageError(
                f"a token has {elastic.k} experts, and none of rank {self.parameters.rank}", f"give 1 to {elastic.k}"
            )

    def weak(self, elastic: Elastic, point: OperatingPoint) -> OperatingPoint:
        """How the weak forward runs."""
        if self.parameters.budget:
            return at_budget(elastic, point, self.parameters.budget)
        return replace(point, routing=(*point.routing, rank_alone(elastic, self.parameters.rank)))

    @property
    def sequences(self) -> int:
        return 2

    def steps(self, request: DecodeRun) -> Steps:
        own, less = request.step(), request.step(self.weak(request.elastic, request.point))
        strong, weak = request.sequence(), request.sequence()
        yield from request.read(strong, own)
        yield from request.read(weak, less)
        while True:
            logits = contrast(strong.forward(own)[-1], weak.forward(less)[-1], self.parameters)
            token = request.take(strong, logits)
            weak.ids.append(token)
            if request.is_over(strong.ids):
                return Decoded(strong.ids, {"forwards": request.spent.forwards})
            yield


def rank_alone(elastic: Elastic, rank: int) -> RoutingStage:
    """Every token's expert of one rank, with the weight of all."""
    layers = len(elastic.layers)
    return RoutingStage(
        layers=(elastic.k or 1,) * layers, stage="rank", parameters={"rank": ((float(rank),),) * layers}, keep_mass=True
    )


def contrast(strong: Tensor, weak: Tensor, asked: ScmoeParameters) -> Tensor:
    """Logits [V] to draw from, -inf outside the plausible set."""
    plausible = strong >= strong.max() + math.log(asked.alpha)
    return (strong + asked.beta * (strong - weak)).masked_fill(~plausible, -math.inf)
