"""First come, first served, with continuous batching and chunked prefill: what engines do today."""

from __future__ import annotations

from collections.abc import Sequence

from ..forecast.step_cost import CostModel
from .base import Ladder, Limits, Policy, Progress, Work
from .fill import Filler, at_level, cheapest, top_floor


class Fifo(Policy):
    """Running requests first, then waiting ones in order of arrival; the whole batch at its highest floor."""

    def __init__(self, ladder: Ladder, cost: CostModel, mixed: bool = False) -> None:
        """mixed: every request at its own floor where that is predicted to be faster (not the paper's baseline)."""
        self.ladder, self.cost, self.mixed = ladder, cost, mixed

    def step(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress], limits: Limits) -> list[Work]:
        filler = Filler(running, limits)
        filler.run(running)
        for progress in waiting:
            if not filler.admit(progress):
                break
        if self.mixed:
            return cheapest(filler.picks, self.ladder, self.cost)
        return at_level(filler.picks, top_floor(filler.picks), self.ladder)
