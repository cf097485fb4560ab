"""First in, first out."""

from __future__ import annotations

from ..base import Key, Moment
from .lru import LRU


class FIFO(LRU):
    """Evicts the key that was loaded first; hits change nothing."""

    def used(self, key: Key, weight: float, now: Moment) -> None:
        pass
