"""Cost-aware: what a byte of a resident key is expected to save."""

from __future__ import annotations

from ..base import Key, Moment
from .lfu import HALF_LIFE
from .ranked import Aged, Ranked
from .ranking import BY_AGED_COUNT, Ranking


class PerByte(Ranked):
    """worth = sum of the routing weights of a key's requests, aged, per byte.

    That is (mean weight) x (aged count) / bytes: importance times the chance of reuse, so a key that matters little or takes much room
    leaves first. Where keys are of one size, it differs from `lfu` by the weights only.
    """

    def __init__(self, *args: object, half_life: float = HALF_LIFE, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._worth = Aged(half_life)

    def count(self, key: Key, weight: float, now: Moment) -> None:
        self._worth.add(key, now.step, max(weight, 1e-6) / self.size_of(key))

    def worth(self, key: Key, now: Moment) -> float:
        return self._worth.rank(key)

    def ranking(self) -> Ranking | None:
        """Where keys are of one size."""
        return Ranking(BY_AGED_COUNT, (self._worth.half_life, 1.0, 1.0), weighs=True)
