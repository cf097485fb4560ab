"""Graph of tokens (S-MoE, arXiv 2505.00792): a token's experts are chosen by the scores of tokens like it, as well as by its own.

p_i = (1 - a) own_i + a sum_j S_ij own_j, and the best k of p are taken. S is a softmax over x_i . x_j / sqrt(d) of the layer's inputs, over
the token itself and the WINDOW tokens of its request before it: no token looks ahead, and a row of p is a distribution where a row of the
router's is one. The paper trains with it and looks at all tokens; the exact form of S was not found, and this one is the issue's, without
training. What came before is kept beside the cache, d + E numbers per token and layer. Shapes: T tokens, W of the window, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import UsageError
from ...point import RoutingStage
from ...routing.base import Routed, Stage, VariantIndex
from ..base import Subject
from .base import Fitted, SkipMethod, all_experts
from .top_p import router_weights, where_off

WINDOW = 16
FEATURES, BEFORE = "graph", "graph before"
NOBODY = -1


class TokenGraph(Stage):
    """Scores of like tokens mixed into a token's own, by the share `a`."""

    neutral_values: ClassVar[Mapping[str, float]] = {"a": 0.0}
    needs: ClassVar[frozenset[str]] = frozenset({"scores", "past"})
    adds: ClassVar[bool] = True
    paper = "arXiv 2505.00792"

    def keeps_all(self, variant: int, layer: int, k: int) -> bool:
        return self.column("a").of_variant(variant, layer)[0] <= 0

    @staticmethod
    def near(routed: Routed, scores: Tensor) -> tuple[Tensor, Tensor]:
        """(S [T, 1 + W], rows sum to 1; scores [T, 1 + W, E]) of every token and those before it."""
        return neighbours(routed, scores)

    def route(self, routed: Routed, which: VariantIndex) -> Routed:
        if not routed.x.is_cpu:
            raise UsageError("a graph of tokens runs on a CPU alone", "use another stage, or --device cpu")
        scores = routed.scores()[:, : routed.experts]
        share = self.column("a").at(routed.layer, which, routed.x.device).reshape(-1, 1)
        mixed = mix(scores, share, *self.near(routed, scores))
        values, index = mixed.topk(routed.index.shape[1], 1)
        none = routed.index < 0
        weight = router_weights(routed, scores, values.masked_fill(none, 0.0), self.keep_mass)
        after = replace(routed, index=index.masked_fill(none, -1), weight=weight.to(routed.weight.dtype))
        return after if isinstance(which, int) else where_off(routed, after, share <= 0)


def mix(scores: Tensor, share: Tensor, near: Tensor, theirs: Tensor) -> Tensor:
    """[T, E]: (1 - a) own + a sum_j S_ij scores_j. share [T or 1, 1]; near [T, W]: S; theirs [T, W, E]: scores of the tokens looked at."""
    return (1 - share) * scores + share * torch.einsum("tw,twe->te", near, theirs)


def neighbours(routed: Routed, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(S [T, 1 + W], rows sum to 1; scores [T, 1 + W, E]) of every token and those before it, and its own noted for those that come."""
    x = routed.x.float()
    found, known = looked_back(routed, torch.cat([x, scores], 1), FEATURES)
    keys, theirs = found[:, :, : x.shape[1]], found[:, :, x.shape[1] :]
    likeness = torch.einsum("td,twd->tw", x, keys) / x.shape[1] ** 0.5
    return likeness.masked_fill(~known, -torch.inf).softmax(1), theirs


def looked_back(routed: Routed, own: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(own [T, n] of every token and of those before it [T, 1 + W, n]; which of them are known [T, 1 + W]).

    What is noted here, under a name, is found by the tokens that come later. Of who knows nothing of what came before W is 0.
    """
    past = routed.past
    if past is None or not len(past.states.tokens):
        return own[:, None], torch.ones(len(own), 1, dtype=torch.bool)
    states, (before, after) = past.states, past.rows[:2]
    notes = states.note(name, (states.sums.shape[1], own.shape[1] + 1), np.float32)
    links = states.note(BEFORE, (), np.int64)  # how far back: rows move, and take their places with them; 0: nobody
    here = after >= 0
    notes[after[here], routed.layer, :-1] = own.numpy()[here]
    notes[after[here], routed.layer, -1] = 1  # known
    links[after[here]] = np.where(before[here] >= 0, after[here] - before[here], 0)
    places = np.full((len(own), WINDOW), NOBODY)
    at = before.copy()
    for w in range(WINDOW):
        at = np.where((at >= 0) & (notes[at, routed.layer, -1] > 0), at, NOBODY)
        places[:, w] = at
        at = np.where((at >= 0) & (links[at] != 0), at - links[at], NOBODY)
    theirs = torch.from_numpy(notes[places, routed.layer, :-1])
    known = torch.from_numpy(places >= 0)
    return torch.cat([own[:, None], theirs], 1), torch.nn.functional.pad(known, (1, 0), value=True)


@dataclass(frozen=True, kw_only=True)
class GraphParameters:
    """a: share of a token's scores that comes from tokens like it, in (0, 1]."""

    a: float = 0.5


class Graph(SkipMethod):
    """`graph:A`: experts are chosen by the scores of like tokens before, with the share A."""

    needs: ClassVar[tuple[str, ...]] = ("router probabilities", "earlier tokens")
    paper = "arXiv 2505.00792"
    stage: ClassVar[type[TokenGraph]] = TokenGraph
    Parameters = GraphParameters
    parameters: GraphParameters

    @classmethod
    def example(cls) -> str:
        return "0.8"

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        name = self.name.partition(":")[0]
        if not 0 < self.parameters.a <= 1:
            raise UsageError(f"'{self.name}' mixes no share between 0 and 1", f"write such as {name}:0.5")
        if mean is not None and mean != subject.k:
            raise UsageError(f"'{self.name}' keeps all of a token's experts", "leave the mean out")
        parameters = {"a": ((self.parameters.a,),) * subject.layers}
        return Fitted(RoutingStage(layers=all_experts(subject), stage=name, parameters=parameters), subject.k)

    def means(self, subject: Subject) -> Sequence[float | None]:
        return [None]
