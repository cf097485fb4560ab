"""How sure the router is of each expert: what PreMoE ranks experts by (arXiv 2505.17639)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..model import MoELayer
from .added_up import AddedUp
from .base import Kept, RoutedBatch

BINS = 64


class Confidence(AddedUp):
    """z is what the router gives an expert before any normalisation. The k experts with the largest z compete: p is a softmax over them.

    utility [E, BINS] (float64): Σ max(z, sigmoid z) over the tokens at which the expert competes, by its p. top [1] (float64): Σ of the
    largest p; score_sum [E] (float64): Σ z of all tokens; tokens [1] (int64). Which p is enough is known when all tokens were seen.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    has_domains = True
    keeps: ClassVar[Mapping[str, Kept]] = {
        "utility": (("E", BINS), torch.float64),
        "top": ((1,), torch.float64),
        "score_sum": (("E",), torch.float64),
        "tokens": ((1,), torch.int64),
    }

    def update(self, batch: RoutedBatch) -> None:
        if batch.scores is None:
            return
        z = batch.scores[:, : self.layer.num_experts].double().cpu()
        best = z.topk(min(batch.index.shape[1], z.shape[1]), 1)
        p = best.values.softmax(1)
        place = best.indices * BINS + (p * BINS).long().clamp(max=BINS - 1)
        value = torch.maximum(best.values, best.values.sigmoid())
        self.values["utility"].view(-1).index_add_(0, place.flatten(), value.flatten())
        self.values["top"] += p.amax(1).sum()
        self.values["score_sum"] += z.sum(0)
        self.values["tokens"] += len(z)

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts * 8 * (BINS + 1) + 16


def threshold(values: Mapping[str, Tensor]) -> float:
    """The mean of the largest p over tokens."""
    return float(values["top"]) / max(1, int(values["tokens"]))


def utility(values: Mapping[str, Tensor], least: float) -> Tensor:
    """[E] (float64): the mean over all tokens of what counts from p = `least` on. Of the bin that holds it, its share above."""
    at = least * BINS
    share = (torch.arange(1, BINS + 1, dtype=torch.float64) - at).clamp(0, 1)
    found: Tensor = (values["utility"] * share).sum(1) / max(1, int(values["tokens"]))
    return found
