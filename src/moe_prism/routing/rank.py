"""Only the expert of one routing rank: the weak routing of self-contrast (SCMoE, arXiv 2405.14507)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .base import SkipStage, VariantIndex, ranks


class Rank(SkipStage):
    """A token's expert number `rank` by routing weight, from 1; 0: all of them. A token with fewer experts keeps its last.

    With `keep_mass` it gets the whole weight of the router's choice, which is the 1 of the paper where the router normalises.
    """

    neutral_values: ClassVar[Mapping[str, float]] = {"rank": 0.0}
    paper = "arXiv 2405.14507"

    def kept(self, ranked: Tensor, layer: int, which: VariantIndex) -> Tensor:
        rank = self.column("rank").at(layer, which, ranked.device)
        there = (ranked >= 0).sum(1, keepdim=True)
        return (rank <= 0) | (ranks(ranked) == rank.minimum(there) - 1)
