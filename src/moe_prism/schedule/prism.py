"""The paper's scheduler: virtual queues, one per level, and the utility of starting each (arXiv 2510.19366, section on scheduling).

A request with floor f is in every queue m >= f, so queue m can serve everyone in it at level m. The utility of a queue is the tokens per
second that its batch would make, U_m = tokens / C(batch, m), and the best queue starts. A queue that fills a batch may start at once; a
request that has waited T_max starts whatever its utility. A request that starts is gone from all queues.

The paper describes batches that run to their end. With continuous batching we read it like this (spec 8.2): who started goes on, so
the level is at least the highest floor running, and the queues m from there on compete for the free places, where the batch
of a queue is what runs plus the oldest of the queue, and its tokens those of this step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .base import Job, Ladder, Limits, Policy, Progress, Work
from .cost import CostModel
from .fill import Filler, Picks, at_level, cheapest, price


@dataclass(frozen=True)
class Candidate:
    """One queue's batch."""

    level: int
    picks: Picks
    works: list[Work]
    utility: float  # tokens per second
    full: bool


class Prism(Policy):
    """Virtual queues with the batch-full and time-out triggers."""

    def __init__(
        self, ladder: Ladder, cost: CostModel, timeout: float | None = None, upgrade: int | None = None, mixed: bool = False
    ) -> None:
        """timeout: T_max in seconds; None is half of a request's time-to-first-token target, 0.1 s if it has none.

        upgrade: most levels a waiting request may be lifted above its floor (ours; None as in the paper: any).
        mixed: each queue's batch also competes with everyone at the own floor (ours).
        """
        self.ladder, self.cost, self.timeout, self.upgrade, self.mixed = ladder, cost, timeout, upgrade, mixed

    def step(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress], limits: Limits) -> list[Work]:
        lowest = max((progress.job.floor for progress in running), default=0)
        overdue = self._overdue(now, waiting)
        if overdue is not None and len(running) < limits.requests:
            lowest = max(lowest, overdue.job.floor)
        buckets: list[list[tuple[int, Progress]]] = [[] for _ in self.ladder.levels]
        for order, progress in enumerate(waiting):
            if progress is not overdue:
                buckets[progress.job.floor].append((order, progress))
        candidates = [
            self._candidate(m, overdue, _oldest(buckets, self._least(m), m), running, limits)
            for m in range(lowest, len(self.ladder))
            if m == lowest or buckets[m]
        ]
        full = [c for c in candidates if c.full] if overdue is None else []
        return max(full or candidates, key=lambda c: (c.utility, -c.level)).works

    def _overdue(self, now: float, waiting: Sequence[Progress]) -> Progress | None:
        """The waiting request that is furthest beyond its T_max."""
        late = [(now - p.job.arrival - self._patience(p.job), -i) for i, p in enumerate(waiting)]
        worst = max(late, default=(0.0, 0))
        return waiting[-worst[1]] if worst[0] > 0 else None

    def _patience(self, job: Job) -> float:
        if self.timeout is not None:
            return self.timeout
        return 0.1 if job.ttft is None else job.ttft / 2

    def _least(self, level: int) -> int:
        return 0 if self.upgrade is None else max(0, level - self.upgrade)

    def _candidate(
        self, level: int, first: Progress | None, queue: Iterator[Progress], running: Sequence[Progress], limits: Limits
    ) -> Candidate:
        filler = Filler(running, limits)
        filler.run(running)
        if first is not None:
            filler.admit(first)
        for progress in queue:
            if not filler.admit(progress):
                break
        works = at_level(filler.picks, level, self.ladder)
        if self.mixed:
            works = min(
                (works, cheapest(filler.picks, self.ladder, self.cost)),
                key=lambda w: price(filler.picks, w, self.ladder, self.cost),
            )
        tokens = sum(tokens for _, tokens in filler.picks)
        utility = tokens / price(filler.picks, works, self.ladder, self.cost) if tokens else 0.0
        return Candidate(level, filler.picks, works, utility, filler.places < 1)


def _oldest(buckets: Sequence[Sequence[tuple[int, Progress]]], least: int, level: int) -> Iterator[Progress]:
    """Virtual queue `level`: the buckets of the floors least..level merged in order of arrival."""
    return (progress for _, progress in heapq.merge(*buckets[least : level + 1]))
