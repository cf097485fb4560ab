"""EdgeMoE's eviction: frequency over the distance to the layer that will ask (arXiv 2308.14352, section 3.3, corrected)."""

from __future__ import annotations

from collections import Counter

from ..base import Key, Moment
from .ranked import Ranked
from .ranking import BY_COUNT_OVER_DISTANCE, Ranking


class EdgeMoE(Ranked):
    """worth = requests so far / a, with a = layers until the key's layer comes again, 1..L.

    The printed score divides by (S - i + I) mod S, which protects the layer just left and is zero at i = I, against the text
    around it; a = (i - I) mod S, with 0 read as S, is what the text describes.
    """

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._uses: Counter[Key] = Counter()

    def count(self, key: Key, weight: float, now: Moment) -> None:
        self._uses[key] += 1

    def worth(self, key: Key, now: Moment) -> float:
        distance = (self.space.layer(key) - now.layer) % self.space.layers or self.space.layers
        return self._uses[key] / distance

    def ranking(self) -> Ranking | None:
        return Ranking(BY_COUNT_OVER_DISTANCE)
