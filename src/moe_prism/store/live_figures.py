"""What a store that runs is doing: misses, bytes and waits since it was opened, and what the best cache would have done lately."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..offload.base import KeySpace

Ints = NDArray[np.int64]

MOST_KEYS = 1 << 16  # of the window
MOST_WORK = 1 << 27  # looks at residents that the bound may take: keys of the window x keys of a pool
EVERY = 5.0  # seconds between two computations of the bound, at least
SHARE = 0.02  # of one core that they may take
NEVER = 1 << 62


class StoreFigures(NamedTuple):
    """Since the store was opened, but for the last two: of the requests of the window's second half, the share that was there, and the
    share that would have been there under Belady's rule, which knows the future. None: too little was asked for so far.
    """

    steps: int = 0
    tokens: int = 0
    requested: int = 0  # records that layers asked for: one counts once per layer and step
    missed: int = 0
    bytes: int = 0  # read
    waited: float = 0.0  # seconds in which nothing could be computed
    hit_rate: float | None = None
    bound: float | None = None


class LiveFigures:
    """Counts requests, and keeps the last of them: at most MOST_KEYS keys.

    `note` is called by the thread that computes, `of_window` may be by another. An engine asks at every step, whether anybody looks or
    not. So the bound, which takes up to half a second, is computed by a thread of its own, most of it without Python's lock.
    """

    def __init__(self, space: KeySpace, capacities: Sequence[int]) -> None:
        """capacities: slots of every layer's pool, or of the one for all."""
        self.space, self.capacities = space, np.array(capacities, np.int64)
        self.steps = self.tokens = self.requested = self.missed = 0
        keys = len(space) // len(self.capacities)
        self.most = max(1, min(MOST_KEYS, MOST_WORK // keys))
        self.first = np.zeros(space.experts * space.parts, np.int64)  # uses of each record of the first layer
        self._groups: deque[tuple[int, Ints, int]] = deque()  # layer, keys, misses
        self._held = 0
        self._known: tuple[float | None, float | None] = None, None
        self._due = 0.0  # when the bound may be computed again
        self._judge: threading.Thread | None = None  # that computes it now

    def reset(self) -> None:
        """Count from nothing again; the window stays."""
        self.steps = self.tokens = self.requested = self.missed = 0

    def note(self, layer: int, keys: Ints, missed: int) -> None:
        """A layer asked for keys, and so many were not there. keys: nobody writes to them afterwards."""
        self.requested += len(keys)
        self.missed += missed
        if layer == 0:
            self.first[keys] += 1
        self._groups.append((layer, keys, missed))
        self._held += len(keys)
        while self._held > self.most and len(self._groups) > 1:
            self._held -= len(self._groups.popleft()[1])

    def of_window(self) -> tuple[float | None, float | None]:
        """(hit rate, bound) of the window's second half, as they were computed last. If that is long ago, begins to compute them anew."""
        if self._judge is None and time.monotonic() >= self._due:
            self._judge = threading.Thread(target=self._look, args=(list(self._groups),), name="bound of a cache")
            self._judge.start()
        return self._known

    def settle(self) -> None:
        """Wait until the rates of the window are there, if they are being computed."""
        judge = self._judge
        if judge is not None:
            judge.join()

    def _look(self, groups: list[tuple[int, Ints, int]]) -> None:
        began = time.monotonic()
        try:
            self._known = self._judged(groups)
        finally:
            ended = time.monotonic()
            self._due, self._judge = ended + max(EVERY, (ended - began) / SHARE), None

    def _judged(self, groups: list[tuple[int, Ints, int]]) -> tuple[float | None, float | None]:
        half = len(groups) // 2
        asked = sum(len(keys) for _, keys, _ in groups[half:])
        if half < self.space.layers or not asked:
            return None, None
        missed = sum(missed for _, _, missed in groups[half:])
        ends = np.cumsum([len(keys) for _, keys, _ in groups])
        shared = len(self.capacities) == 1
        pool = np.array([0 if shared else layer for layer, _, _ in groups], np.int64)
        every = np.concatenate([keys for _, keys, _ in groups])
        found = belady_misses(every, ends, pool, self.capacities, len(self.space) // len(self.capacities), half)
        return 1 - missed / asked, 1 - found / asked


@njit(nogil=True, cache=True)
def belady_misses(keys: Ints, ends: Ints, pool: Ints, capacities: Ints, width: int, since: int) -> int:
    """Misses in groups since, since + 1, ... where the key leaves that is needed last, as `offload.cache.belady` has it.

    keys: of all groups, group g's end at ends[g]; pool [G]: whose keys are pool * width..(pool + 1) * width - 1. Nothing of a group leaves
    for the group; what does not fit beside it is used without coming in. Everything is empty at first.
    """
    following, last = np.full(len(keys), NEVER, np.int64), np.full(len(capacities) * width, NEVER, np.int64)
    for g in range(len(ends) - 1, -1, -1):
        begin = ends[g - 1] if g else 0
        for i in range(begin, ends[g]):
            following[i] = last[keys[i]]
        for i in range(begin, ends[g]):
            last[keys[i]] = g
    due = np.full(len(last), -1, np.int64)  # next use of residents
    own = np.full(len(last), -1, np.int64)  # the last group that asked
    used, held = np.zeros(len(last), np.int64), np.zeros(len(capacities), np.int64)
    clock, missed = 0, 0
    for g in range(len(ends)):
        begin, p = ends[g - 1] if g else 0, pool[g]
        for i in range(begin, ends[g]):
            own[keys[i]] = g
        for i in range(begin, ends[g]):
            if due[keys[i]] >= 0:
                due[keys[i]], used[keys[i]] = following[i], clock
                clock += 1
        for i in range(begin, ends[g]):
            key = keys[i]
            if due[key] >= 0:
                continue
            missed += g >= since
            if held[p] >= capacities[p]:
                worst = -1
                for v in range(p * width, (p + 1) * width):
                    if due[v] < 0 or own[v] == g:
                        continue
                    if worst < 0 or due[v] > due[worst] or (due[v] == due[worst] and used[v] < used[worst]):
                        worst = v
                if worst < 0:
                    continue
                due[worst] = -1
                held[p] -= 1
            due[key], used[key] = following[i], clock
            clock += 1
            held[p] += 1
    return missed
