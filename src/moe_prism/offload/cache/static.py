"""A fixed preference: the experts that calibration text used most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..base import Key, KeySpace, Moment
from ..trace import Trace
from .ranked import Ranked
from .ranking import BY_PROFILE, Ranking


class Static(Ranked):
    """worth = requests on the calibration trace. With room for one step's keys beside it this is a hot list that never changes."""

    needs_fit = True

    def __init__(self, *args: object, profile: Sequence[float] = (), **settings: object) -> None:
        """profile: one number per key of the space; empty = all equal."""
        super().__init__(*args, **settings)
        self._profile = profile or [0.0] * len(self.space)

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace, slots: int) -> dict[str, Any]:
        from ..replay import groups

        counts = np.zeros(len(space))
        for group in groups(trace, space):
            counts[group.keys] += 1
        return {"profile": counts.tolist()}

    @classmethod
    def shapes(cls, space: KeySpace) -> dict[str, tuple[int, ...]]:
        return {"profile": (len(space),)}

    def worth(self, key: Key, now: Moment) -> float:
        return self._profile[key]

    def ranking(self) -> Ranking | None:
        return Ranking(BY_PROFILE, numbers=np.array(self._profile, np.float64)[:, None])
