"""What a layer's experts have in common: how often two are chosen together, and how alike the router's scores of two are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ..model import MoELayer
from .added_up import AddedUp
from .base import Kept, RoutedBatch

PER_PAIR = ("E", "E")


class Pairs(AddedUp):
    """together [E, E] (int64): tokens that chose both, on the diagonal those that chose the one. score_gram [E, E] (float64): Σ z zᵀ
    over all tokens, z what the router gave every expert before any normalisation. tokens [1] (int64) of all, scored_tokens [1] of those in
    that sum.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    has_domains = True
    keeps: ClassVar[Mapping[str, Kept]] = {
        "together": (PER_PAIR, torch.int64),
        "score_gram": (PER_PAIR, torch.float64),
        "tokens": ((1,), torch.int64),
        "scored_tokens": ((1,), torch.int64),
    }

    def update(self, batch: RoutedBatch) -> None:
        experts = self.layer.num_experts
        chosen = torch.zeros(len(batch.x), experts + 1, device=batch.x.device)
        known = (batch.index >= 0) & (batch.index < experts)
        chosen.scatter_(1, batch.index.long().masked_fill(~known, experts), 1.0)
        chosen = chosen[:, :experts]
        self.values["together"] += (chosen.T @ chosen).round().long().cpu()  # whole numbers below 2^24: a batch is smaller
        self.values["tokens"] += len(batch.x)
        if batch.scores is not None:
            z = batch.scores[:, :experts].double()
            self.values["score_gram"] += (z.T @ z).cpu()
            self.values["scored_tokens"] += len(z)

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts**2 * 16 + 16
