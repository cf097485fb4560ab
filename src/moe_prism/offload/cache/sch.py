"""The segment cache of the SRP/SCH paper: perfect knowledge of the next m tokens, none beyond."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from ..base import Key, Moment
from .ranked import Ranked


class SCH(Ranked):
    """worth = requests in the next m steps; ties to the least recently used. Its hit rate is the metric SCH(m)."""

    needs_future = True

    def __init__(self, *args: object, m: int = 16, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.m = m
        self._uses: Mapping[Key, Sequence[int]] = {}

    def foresee(self, uses: Mapping[Key, Sequence[int]]) -> None:
        self._uses = uses

    def worth(self, key: Key, now: Moment) -> float:
        clocks = self._uses.get(key, ())
        return bisect_right(clocks, now.clock + self.m * self.space.layers) - bisect_right(clocks, now.clock)
