"""Least frequently used, aged."""

from __future__ import annotations

from ..base import Key, Moment
from .ranked import Aged, Ranked
from .ranking import BY_AGED_COUNT, Ranking

HALF_LIFE = 16.0  # steps; on prism-nano 8 to 32 are within a percent of each other


class LFU(Ranked):
    """Evicts the key with the smallest count of requests, where a request counts half as much after `half_life` steps.

    Counts outlive eviction: there are few keys and a count is one number.
    """

    def __init__(self, *args: object, half_life: float = HALF_LIFE, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._uses = Aged(half_life)

    def count(self, key: Key, weight: float, now: Moment) -> None:
        self._uses.add(key, now.step)

    def worth(self, key: Key, now: Moment) -> float:
        return self._uses.rank(key)

    def ranking(self) -> Ranking | None:
        return Ranking(BY_AGED_COUNT, (self._uses.half_life, 1.0, 1.0))
