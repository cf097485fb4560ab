"""What most policies share: every resident key has a worth, and the least worthy leaves."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Container

from ..base import CachePolicy, Key, Moment


class Ranked(CachePolicy):
    """Evicts the smallest `worth`; of equal ones the least recently used."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.resident: dict[Key, None] = {}  # least recently used first

    @abstractmethod
    def worth(self, key: Key, now: Moment) -> float: ...

    def count(self, key: Key, weight: float, now: Moment) -> None:
        """A request of a key, hit or miss."""

    def used(self, key: Key, weight: float, now: Moment) -> None:
        self.resident[key] = self.resident.pop(key)
        self.count(key, weight, now)

    def missed(self, key: Key, weight: float, now: Moment) -> None:
        self.count(key, weight, now)

    def entered(self, key: Key, weight: float, now: Moment) -> None:
        self.resident[key] = None

    def left(self, key: Key, now: Moment) -> None:
        del self.resident[key]

    def victim(self, blocked: Container[Key], now: Moment) -> Key:
        return min((k for k in self.resident if k not in blocked), key=lambda k: self.worth(k, now))


class Aged:
    """Counts that halve every `half_life` steps, as logarithms: a key's number changes only when it is used."""

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life
        self._log2: dict[Key, float] = {}

    def add(self, key: Key, step: int, amount: float = 1.0) -> None:
        new = step / self.half_life + math.log2(amount)
        old = self._log2.get(key)
        self._log2[key] = new if old is None else max(old, new) + math.log2(1 + 2.0 ** -abs(old - new))

    def rank(self, key: Key) -> float:
        """A number that orders keys by their count, at any step; -inf if never used."""
        return self._log2.get(key, -math.inf)

    def log2(self, key: Key, step: int, floor: float) -> float:
        """The binary logarithm of the count at `step` plus the floor."""
        old = self._log2.get(key)
        return math.log2(floor if old is None else 2.0 ** (old - step / self.half_life) + floor)
