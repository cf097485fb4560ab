"""The paper's scheduler: virtual queues, one per level, and the utility of starting each (arXiv 2510.19366, section on scheduling).

A request with floor f is in every queue m >= f, so queue m can serve everyone in it at level m. The utility of a queue is the tokens per
second that its batch would make, U_m = tokens / C(batch, m), and the best queue starts. A queue that fills a batch may start at once; a
request that has waited T_max starts whatever its utility. A request that starts is gone from all queues.

The paper describes batches that run to their end. With continuous batching it can be read in two ways, and tokens are those of the step:

- `regroup` (default, the stronger one): every step is a launch, and who runs returns to the queues after it. The batch of a queue is
  everyone running with a floor up to m plus the oldest of the queue; who had no token for T_max is due like one who waits.
- without: who started goes on, so the level is at least the highest floor running, and the queues m from there on compete for
  the free places; the batch of a queue is what runs plus the oldest of the queue. Nearly always the highest floor runs, and this is `fifo`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..forecast.step_cost import CostModel
from .base import Ladder, Limits, Policy, Progress, Work
from .fill import Filler, Picks, at_level, cheapest, price


@dataclass(frozen=True)
class QueueStart:
    """One queue's batch."""

    level: int
    picks: Picks
    works: list[Work]
    utility: float  # tokens per second
    full: bool


class Prism(Policy):
    """Virtual queues with the batch-full and time-out triggers."""

    def __init__(
        self,
        ladder: Ladder,
        cost: CostModel,
        timeout: float | None = None,
        upgrade: int | None = None,
        regroup: bool = True,
        mixed: bool = False,
    ) -> None:
        """timeout: T_max in seconds; None is half of a request's target (first token, or per token while it runs), 0.1 s if it has none.

        upgrade: most levels a waiting request may be lifted above its floor (ours; None as in the paper: any).
        mixed: each queue's batch also competes with everyone at the own floor (ours).
        """
        self.ladder, self.cost, self.timeout, self.upgrade = ladder, cost, timeout, upgrade
        self.regroup, self.mixed = regroup, mixed
        self._last: dict[str, float] = {}  # when a running request last took part in a step

    def step(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress], limits: Limits) -> list[Work]:
        overdue = self._overdue(now, waiting if len(running) < limits.requests else (), running)
        lowest = overdue.job.floor if overdue is not None else 0
        if not self.regroup:
            lowest = max((lowest, *(progress.job.floor for progress in running)))
        buckets: list[list[tuple[int, Progress]]] = [[] for _ in self.ladder.levels]
        for order, progress in enumerate(waiting):
            if progress is not overdue:
                buckets[progress.job.floor].append((order, progress))
        floors = {progress.job.floor for progress in (*waiting, *running)}
        candidates = [
            self._candidate(m, overdue, _oldest(buckets, self._least(m), m), running, limits)
            for m in range(lowest, len(self.ladder))
            if m in floors or m == lowest
        ]
        full = [c for c in candidates if c.full] if overdue is None else []
        works = max(full or candidates, key=lambda c: (c.utility, -c.level)).works
        if self.regroup:
            self._remember(now, works, running)
        return works

    def _overdue(self, now: float, waiting: Sequence[Progress], running: Sequence[Progress]) -> Progress | None:
        """The request that is furthest beyond its T_max: none if nobody is."""
        worst, found = 0.0, None
        for progress in waiting:
            late = now - progress.job.arrival - self._patience(progress.job.ttft)
            if late > worst:
                worst, found = late, progress
        for progress in running if self.regroup else ():
            late = now - self._last.get(progress.job.id, now) - self._patience(progress.job.tpot)
            if late > worst:
                worst, found = late, progress
        return found

    def _patience(self, target: float | None) -> float:
        if self.timeout is not None:
            return self.timeout
        return 0.1 if target is None else target / 2

    def _remember(self, now: float, works: Sequence[Work], running: Sequence[Progress]) -> None:
        """When each running request last took part; since now for one seen for the first time."""
        self._last = {progress.job.id: self._last.get(progress.job.id, now) for progress in running}
        self._last.update((work.id, now) for work in works)

    def _least(self, level: int) -> int:
        return 0 if self.upgrade is None else max(0, level - self.upgrade)

    def _candidate(
        self, level: int, first: Progress | None, queue: Iterator[Progress], running: Sequence[Progress], limits: Limits
    ) -> QueueStart:
        filler = Filler(running, limits)
        group = [p for p in running if p.job.floor <= level]
        runs = any(p is first for p in group)
        if first is not None and runs:
            group = [first, *(p for p in group if p is not first)]
        filler.run(group)
        if first is not None and not runs:
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
        return QueueStart(level, filler.picks, works, utility, filler.places < 1)


def _oldest(buckets: Sequence[Sequence[tuple[int, Progress]]], least: int, level: int) -> Iterator[Progress]:
    """Virtual queue `level`: the buckets of the floors least..level merged in order of arrival."""
    return (progress for _, progress in heapq.merge(*buckets[least : level + 1]))
