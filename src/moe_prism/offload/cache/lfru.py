"""Frequency weighted by recency, as proposed for vLLM's expert cache (its RFC 38256)."""

from __future__ import annotations

from collections import Counter

from ..base import Key, Moment
from .ranked import Ranked
from .ranking import BY_COUNT_OVER_AGE, Ranking


class LFRU(Ranked):
    """worth = requests so far / (1 + steps since the last one)."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._uses: Counter[Key] = Counter()
        self._last: dict[Key, int] = {}

    def count(self, key: Key, weight: float, now: Moment) -> None:
        self._uses[key] += 1
        self._last[key] = now.step

    def worth(self, key: Key, now: Moment) -> float:
        return self._uses[key] / (1 + now.step - self._last.get(key, 0))

    def ranking(self) -> Ranking | None:
        return Ranking(BY_COUNT_OVER_AGE)
