"""What the router gives every expert over all tokens, chosen or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..model import MoELayer
from .base import Collector, Kept, RoutedBatch

KINDS = ("softmax", "sigmoid", "identity")
"""How the score of an expert becomes its weight, before any normalisation over the chosen."""


class Scores(Collector):
    """prob_sum [E] (float64): router probabilities summed over all tokens; tokens [1]; kind [1]: place in KINDS, -1 before any token.

    Probabilities are before the routed scale; those of a sigmoid router are without selection bias and divided by their sum, so that
    every token counts alike. Which kind a router is, is read off the first batch: the one whose ratios the routing weights have.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    has_domains = True
    keeps: ClassVar[Mapping[str, Kept]] = {
        "prob_sum": (("E",), torch.float64),
        "tokens": ((1,), torch.int64),
        "kind": ((1,), torch.int64),
    }

    def __init__(self, layer: MoELayer, *, capacity: int, seed: int) -> None:
        super().__init__(layer, capacity=capacity, seed=seed)
        self.prob_sum = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.tokens = torch.zeros(1, dtype=torch.int64)
        self.kind = torch.tensor([-1])

    def update(self, batch: RoutedBatch) -> None:
        if batch.scores is None:
            return
        if self.kind < 0:
            self.kind[0] = kind_of(batch.scores, batch.index, batch.weight)
        self.prob_sum += probabilities(batch.scores, KINDS[int(self.kind)]).double().sum(0).cpu()
        self.tokens += len(batch.x)

    def state(self) -> dict[str, Tensor]:
        return {"prob_sum": self.prob_sum, "tokens": self.tokens, "kind": self.kind}

    def load(self, state: dict[str, Tensor]) -> None:
        self.prob_sum, self.tokens, self.kind = (state[k].clone() for k in ("prob_sum", "tokens", "kind"))

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what another pass over other tokens found."""
        self.prob_sum, self.tokens = self.prob_sum + state["prob_sum"], self.tokens + state["tokens"]
        self.kind = torch.maximum(self.kind, state["kind"])

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts * 8 + 16


def raw(scores: Tensor, kind: str) -> Tensor:
    """Weights [T, E] (float32) before normalisation over the chosen and scale."""
    scores = scores.float()
    return scores.softmax(-1) if kind == "softmax" else scores.sigmoid() if kind == "sigmoid" else scores


def probabilities(scores: Tensor, kind: str) -> Tensor:
    """[T, E], rows summing to 1."""
    p = raw(scores, kind)
    return p / p.sum(-1, keepdim=True).clamp(min=1e-30)


def kind_of(scores: Tensor, index: Tensor, weight: Tensor) -> int:
    """Place in KINDS of the function whose values at the chosen experts have the ratios of the routing weights.

    With one expert per token there is no ratio within a token; the weights of different tokens are compared then.
    """
    index, weight = index.clamp(0, scores.shape[1] - 1).long(), weight.float()
    dim = 1 if index.shape[1] > 1 else 0
    wanted = weight / weight.sum(dim, keepdim=True).clamp(min=1e-30)
    errors = []
    for kind in KINDS:
        mine = raw(scores, kind).gather(1, index)
        errors.append(float((mine / mine.sum(dim, keepdim=True).clamp(min=1e-30) - wanted).abs().mean()))
    return errors.index(min(errors))
