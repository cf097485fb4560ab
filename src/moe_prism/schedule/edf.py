"""Earliest deadline first with a gate on raising the batch K: the policy of the paper's released code (spec 8.3)."""

from __future__ import annotations

from collections.abc import Sequence

from ..forecast.step_cost import CostModel
from .base import Job, Ladder, Limits, Policy, Progress, Work
from .fill import Filler, at_level, cheapest, is_decode, top_floor

SAFETY = 1.5  # on the predicted prefill time
URGENT = 0.3  # share of the target below which slack opens the gate
ENDING = 5  # output tokens: a request with no more left does not count for the K that is being served


class Edf(Policy):
    """Groups waiting requests by floor; late groups first, then low floors; the whole batch at its highest floor."""

    def __init__(self, ladder: Ladder, cost: CostModel, patience: float = 10.0, mixed: bool = False) -> None:
        """patience: seconds to the first token for requests without a target (ours: the released code can starve them)."""
        self.ladder, self.cost, self.patience, self.mixed = ladder, cost, patience, mixed
        self._prefill_seconds: dict[tuple[int, int], float] = {}

    def step(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress], limits: Limits) -> list[Work]:
        filler = Filler(running, limits)
        filler.run(running)
        for progress in self._order(now, waiting, running):
            if not filler.admit(progress):
                break
        if self.mixed:
            return cheapest(filler.picks, self.ladder, self.cost)
        return at_level(filler.picks, top_floor(filler.picks), self.ladder)

    def _order(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress]) -> list[Progress]:
        staying = [p.job.floor for p in running if not is_decode(p) or p.job.output - p.generated > ENDING]
        serving = max(staying, default=-1)
        groups: dict[int, list[tuple[float, int]]] = {}
        for i, progress in enumerate(waiting):
            job = progress.job
            slack = self._target(job) - (now - job.arrival) - SAFETY * self._prefill(job.prompt, max(serving, job.floor))
            gated = running and job.floor > serving and slack >= URGENT * self._target(job)
            if not gated:
                groups.setdefault(job.floor, []).append((slack, i))
        ordered = [(floor, sorted(members)) for floor, members in groups.items()]
        ordered.sort(key=lambda group: (0, group[1][0][0]) if group[1][0][0] < 0 else (1, group[0]))
        return [waiting[i] for _, members in ordered for _, i in members]

    def _target(self, job: Job) -> float:
        return self.patience if job.ttft is None else job.ttft

    def _prefill(self, tokens: int, level: int) -> float:
        key = (tokens, level)
        if key not in self._prefill_seconds:
            if len(self._prefill_seconds) >= 4096:
                self._prefill_seconds.clear()
            self._prefill_seconds[key] = float(self.cost.base(self.cost.chunk(tokens, self.ladder.levels[level].slots, 0)))
        return self._prefill_seconds[key]
