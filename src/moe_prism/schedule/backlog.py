"""Waiting requests, kept in order between steps: a step pays for what changed, not for what waits."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Progress

Lane = tuple[int, str]  # priority, class


class Queue:
    """One lane. `timely`: may still meet the target, by the moment it must start. `late`: the others, by arrival."""

    def __init__(self) -> None:
        self.timely: list[tuple[float, int, Progress]] = []
        self.late: deque[tuple[float, int, Progress]] = deque()
        self.late_tokens = 0  # prompt tokens of the late ones
        self._columns: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.timely) + len(self.late)

    def add(self, start_by: float, order: int, progress: Progress) -> None:
        """Put a request in its place."""
        place = bisect_left(self.timely, (start_by, order))
        self.timely.insert(place, (start_by, order, progress))
        if self._columns is not None:
            column = np.array([[start_by], [progress.job.prompt], [progress.job.prompt + progress.job.output]])
            self._columns = np.concatenate([self._columns[:, :place], column, self._columns[:, place:]], axis=1)

    def expire(self, now: float) -> None:
        """Move who can no longer start in time."""
        n = bisect_left(self.timely, (now,))
        if n:
            self.late.extend((p.job.arrival, order, p) for _, order, p in self.timely[:n])
            self.late_tokens += sum(p.job.prompt for _, _, p in self.timely[:n])
            del self.timely[:n]
            self._drop(n)

    def keep(self, ids: set[str]) -> None:
        """Forget everyone else."""
        self.timely = [entry for entry in self.timely if entry[2].job.id in ids]
        self.late = deque(entry for entry in self.late if entry[2].job.id in ids)
        self.late_tokens = sum(progress.job.prompt for _, _, progress in self.late)
        self._columns = None

    def pop(self, late: bool) -> Progress:
        """Take a request out."""
        if late:
            progress = self.late.popleft()[2]
            self.late_tokens -= progress.job.prompt
            return progress
        self._drop(1)
        return self.timely.pop(0)[2]

    def _drop(self, n: int) -> None:
        if self._columns is not None:
            self._columns = self._columns[:, n:]

    def forget_columns(self) -> None:
        self._columns = None

    def columns(self) -> NDArray[np.float64]:
        """[3, n]: start-by, prompt tokens, promised cache tokens of the timely ones."""
        if self._columns is None:
            rows = [(s, p.job.prompt, p.job.prompt + p.job.output) for s, _, p in self.timely]
            self._columns = np.array(rows, dtype=np.float64).reshape(-1, 3).T
        return self._columns


class Backlog:
    """All lanes. `start_by` says until when a request must be started; it is asked once per request."""

    def __init__(self, start_by: Callable[[Progress], float]) -> None:
        self._start_by = start_by
        self.lanes: dict[Lane, Queue] = {}
        self._known: set[str] = set()
        self._order = 0
        self.changes = 0  # arrivals and departures so far

    def __len__(self) -> int:
        return len(self._known)

    @property
    def late(self) -> int:
        """Requests that can no longer start in time."""
        return sum(len(queue.late) for queue in self.lanes.values())

    @property
    def late_tokens(self) -> int:
        """Their prompt tokens."""
        return sum(queue.late_tokens for queue in self.lanes.values())

    def sync(self, waiting: Sequence[Progress], now: float) -> None:
        """Take over arrivals, which are at the end; rebuild if anything else changed (a request was cancelled or refused)."""
        fresh: list[Progress] = []
        for progress in reversed(waiting):
            if progress.job.id in self._known:
                break
            fresh.append(progress)
        if len(fresh) > 8:  # cheaper to read all anew than to insert one by one
            for queue in self.lanes.values():
                queue.forget_columns()
        for progress in reversed(fresh):
            self._add(progress)
        if len(self._known) != len(waiting):
            self.rebuild(waiting)
        for lane, queue in list(self.lanes.items()):
            queue.expire(now)
            if not queue:
                del self.lanes[lane]

    def rebuild(self, waiting: Sequence[Progress]) -> None:
        """Forget who is gone and add who is new."""
        here = {progress.job.id for progress in waiting}
        if self._known - here:
            for queue in self.lanes.values():
                queue.keep(here)
        for progress in waiting:
            if progress.job.id not in self._known:
                self._add(progress)
        self._known = here

    def take(self, lane: Lane, late: bool) -> Progress:
        """Remove the head of a lane."""
        progress = self.lanes[lane].pop(late)
        self.changes += 1
        self._known.discard(progress.job.id)
        return progress

    def timely(self) -> NDArray[np.float64]:
        """[3, n] columns of all timely requests in the order in which they must start."""
        columns = [queue.columns() for queue in self.lanes.values() if queue.timely]
        if not columns:
            return np.zeros((3, 0))
        joined = np.concatenate(columns, axis=1)
        return joined if len(columns) == 1 else joined[:, np.argsort(joined[0], kind="stable")]

    def _add(self, progress: Progress) -> None:
        lane = (progress.job.priority, progress.job.kind)
        if lane not in self.lanes:
            self.lanes[lane] = Queue()
        self.lanes[lane].add(self._start_by(progress), self._order, progress)
        self._known.add(progress.job.id)
        self._order += 1
        self.changes += 1


def still_waiting(progress: Progress, waiting: Sequence[Progress]) -> bool:
    """Is it in `waiting`? Found at once if that is in order of arrival, as it should be."""
    job = progress.job
    i = bisect_left(waiting, job.arrival, key=lambda p: p.job.arrival)
    while i < len(waiting) and waiting[i].job.arrival == job.arrival:
        if waiting[i].job.id == job.id:
            return True
        i += 1
    return any(p.job.id == job.id for p in waiting)
