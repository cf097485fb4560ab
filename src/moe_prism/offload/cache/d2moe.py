"""What D2MoE gives up under pressure (arXiv 2504.15299): high bit planes before the planes that they refine."""

from __future__ import annotations

import numpy as np

from ..base import Key, Moment
from .ranked import Ranked
from .ranking import BY_PROFILE, Ranking


class HighPlanesFirst(Ranked):
    """Lower bits leave before upper ones, the least recently used first. Where records have no planes it is `lru`.

    A record's lower bits are of use only beside its upper ones. In the paper the layer before gives up its own; here layers have pools of
    their own, or share one by this order.
    """

    def worth(self, key: Key, now: Moment) -> float:
        return -float(self.space.part(key) % self.space.planes)

    def ranking(self) -> Ranking | None:
        part = np.arange(len(self.space)) % self.space.parts
        return Ranking(BY_PROFILE, numbers=-(part % self.space.planes).astype(np.float64)[:, None])
