"""SparseUnified's split (arXiv 2512.02351, without its training): by how much a neuron says on the whole."""

from __future__ import annotations

from ...compress.split import Deal
from .base import DenseSeen, SplitMethod, by_strength, snake


class ByImportance(SplitMethod):
    """The neurons with the largest mean |a| always run, the rest is dealt in snake order.

    The paper leaves the first and the last layer dense. Here they are split too.
    """

    def deal(self, seen: DenseSeen) -> Deal:
        order = by_strength(seen.importance)
        return Deal(order[: seen.shared], tuple(snake(order[seen.shared :], seen.experts)))
