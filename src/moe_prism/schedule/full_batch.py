"""The paper's second baseline: wait for a full batch, run it to its end, start the next."""

from __future__ import annotations

from collections.abc import Sequence

from ..forecast.step_cost import CostModel
from .base import Ladder, Limits, Policy, Progress, Work
from .fill import Filler, at_level, cheapest, top_floor


class FullBatch(Policy):
    """Starts when `size` requests wait or the oldest has waited `timeout` seconds; nobody joins a batch that runs."""

    def __init__(self, ladder: Ladder, cost: CostModel, size: int = 0, timeout: float = 1.0, mixed: bool = False) -> None:
        """size: 0 means as many as the engine takes. timeout: seconds, so that the wait is bounded (ours; the paper gives none)."""
        self.ladder, self.cost, self.size, self.timeout, self.mixed = ladder, cost, size, timeout, mixed
        self._batch: set[str] = set()
        self._start: float | None = None

    def step(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress], limits: Limits) -> list[Work]:
        filler = Filler(running, limits)
        filler.run(running)
        self._batch &= {progress.job.id for progress in (*waiting, *running)}
        self._start = None
        if not self._batch and not running:
            self._launch(now, waiting, limits)
        for progress in waiting:
            if progress.job.id in self._batch and not filler.admit(progress):
                break
        if self.mixed:
            return cheapest(filler.picks, self.ladder, self.cost)
        return at_level(filler.picks, top_floor(filler.picks), self.ladder)

    def _launch(self, now: float, waiting: Sequence[Progress], limits: Limits) -> None:
        size = min(self.size or limits.requests, limits.requests)
        if not waiting:
            return
        due = waiting[0].job.arrival + self.timeout
        if len(waiting) < size and now < due:
            self._start = due
            return
        cache = limits.free_cache
        for progress in waiting[:size]:
            cache -= progress.job.prompt + progress.job.output
            if cache < 0:
                break
            self._batch.add(progress.job.id)

    def wake(self, now: float) -> float | None:
        return self._start
