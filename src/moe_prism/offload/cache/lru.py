"""Least recently used: the baseline everybody has."""

from __future__ import annotations

from collections.abc import Container

from ..base import Key, Moment
from .ranked import Ranked
from .ranking import BY_RECENCY, Ranking


class LRU(Ranked):
    """Evicts the key whose last request (or prefetch) is longest ago."""

    def worth(self, key: Key, now: Moment) -> float:
        return 0.0

    def ranking(self) -> Ranking | None:
        return Ranking(BY_RECENCY)

    def victim(self, blocked: Container[Key], now: Moment) -> Key:
        return next(k for k in self.resident if k not in blocked)
