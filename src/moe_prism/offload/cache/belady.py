"""The bound: evict what is needed last (Belady 1966). Needs the future."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from ..base import Key, Moment
from .ranked import Ranked


class Belady(Ranked):
    """worth = - the clock of the next request. The most hits any demand cache can have where keys are of one size.

    window: how many steps the look-ahead reaches; a key not needed within them counts as never needed, ties to the least recently used.
    0 is `lru`, None everything (Read-ME, arXiv 2410.19123, evicts like this with the routes its pre-gate knows).
    """

    needs_future = True

    def __init__(self, *args: object, window: int | None = None, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._reach = math.inf if window is None else window * self.space.layers
        self._uses: Mapping[Key, Sequence[int]] = {}
        self._next: dict[Key, float] = {}

    def foresee(self, uses: Mapping[Key, Sequence[int]]) -> None:
        self._uses = uses

    def used(self, key: Key, weight: float, now: Moment) -> None:
        super().used(key, weight, now)
        self._look(key, now)

    def entered(self, key: Key, weight: float, now: Moment) -> None:
        super().entered(key, weight, now)
        self._look(key, now)

    def _look(self, key: Key, now: Moment) -> None:
        clocks = self._uses.get(key, ())
        at = bisect_right(clocks, now.clock)
        self._next[key] = clocks[at] if at < len(clocks) else math.inf

    def worth(self, key: Key, now: Moment) -> float:
        next_use = self._next[key]
        return -next_use if next_use <= now.clock + self._reach else -math.inf
