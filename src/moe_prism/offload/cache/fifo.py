"""First in, first out."""

from __future__ import annotations

from ..base import Key, Moment
from .lru import LRU
from .ranking import BY_RECENCY, Ranking


class FIFO(LRU):
    """Evicts the key that was loaded first; hits change nothing."""

    def used(self, key: Key, weight: float, now: Moment) -> None:
        pass

    def ranking(self) -> Ranking | None:
        return Ranking(BY_RECENCY, renews=False)
