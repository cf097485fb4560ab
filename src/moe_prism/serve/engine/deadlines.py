"""By when requests must have ended."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Collection, Iterator

FEW = 256
"""Deadlines that are kept whosever they are."""


class Deadlines:
    """The next one first, of the names in `running`.

    Most requests end long before theirs: what those leave goes once it is the larger part.
    """

    def __init__(self, running: Collection[str]) -> None:
        self._running, self._lock = running, threading.Lock()
        self._every: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._every)

    def add(self, deadline: float, name: str) -> None:
        """From any thread, of a request that goes on."""
        with self._lock:
            heapq.heappush(self._every, (deadline, name))
            if len(self._every) > max(FEW, 2 * len(self._running)):
                self._every = [each for each in self._every if each[1] in self._running]
                heapq.heapify(self._every)

    def passed(self, now: float) -> Iterator[str]:
        """Take out those before now; requests among them may have ended."""
        while True:
            with self._lock:
                if not self._every or self._every[0][0] > now:
                    return
                _, name = heapq.heappop(self._every)
            yield name
