"""HOBBIT's weighted priority (arXiv 2411.01433, section 4.4), its weights fitted on a calibration trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from ..base import Key, KeySpace, Moment
from ..replay import ReplayOptions, replay
from ..trace import Trace
from .ranked import Ranked
from .ranking import BY_MIX, Ranking

T1 = 0.6  # the paper's first threshold for Mixtral: unimportance up to it is loaded in high precision
GRID = 3  # weights are tried in steps of 1/3
FIT_STEPS = 512  # of the calibration trace


class Hobbit(Ranked):
    """worth = w1 R/T + w2 F/T + w3 H/T + w4 (1 - ((l - l_now + L) mod L)/L).

    Since the sequence began: T steps, R the step of the last request, F requests, H requests in high precision. An expert is loaded in
    high precision if the routing weights of the stronger ones sum to at most T1; a key's own weight is all that is known here, so H
    counts requests whose weight reaches the level that gives the same share of them on the calibration trace.
    """

    needs_fit = True

    def __init__(
        self, *args: object, mix: Sequence[float] = (0.25, 0.25, 0.25, 0.25), high: float = 0.0, **settings: object
    ) -> None:
        """mix: w1..w4, sum 1; high: the routing weight from which a request counts as high precision."""
        super().__init__(*args, **settings)
        self._mix, self._high = tuple(mix), high
        self._begin = 0
        self._step = 0
        self._last: dict[Key, int] = {}
        self._uses: Counter[Key] = Counter()
        self._important: Counter[Key] = Counter()

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace, slots: int) -> dict[str, Any]:
        """The mix of a grid (its corners are the four pure policies) with the fewest misses in a pool of `slots` slots per layer."""
        few = trace.rows(trace.step < trace.step[0] + FIT_STEPS)
        high = high_level(trace)
        settings = [{"mix": mix, "high": high} for mix in mixes()]
        misses = [replay(few, cls, slots, ReplayOptions(space=space, settings=each)).misses for each in settings]
        return settings[int(np.argmin(misses))]

    @classmethod
    def shapes(cls, space: KeySpace) -> dict[str, tuple[int, ...]]:
        return {"mix": (4,), "high": ()}

    def new_sequence(self) -> None:
        self._begin = self._step + 1
        for record in (self._last, self._uses, self._important):
            record.clear()

    def count(self, key: Key, weight: float, now: Moment) -> None:
        self._step = now.step
        self._last[key] = now.step
        self._uses[key] += 1
        self._important[key] += weight >= self._high

    def worth(self, key: Key, now: Moment) -> float:
        """The weighted priority of a resident key."""
        steps = max(1, now.step - self._begin + 1)
        recent = (self._last[key] - self._begin + 1) / steps if key in self._last else 0.0
        ahead = (self.space.layer(key) - now.layer) % self.space.layers / self.space.layers
        w = self._mix
        return w[0] * recent + (w[1] * self._uses[key] + w[2] * self._important[key]) / steps + w[3] * (1 - ahead)

    def ranking(self) -> Ranking | None:
        return Ranking(BY_MIX, numbers=np.array([[*self._mix, self._high]], np.float64))


def mixes() -> Iterator[tuple[float, ...]]:
    """All (w1..w4) in steps of 1/GRID that sum to 1."""
    for first in product(range(GRID + 1), repeat=3):
        if sum(first) <= GRID:
            yield tuple(n / GRID for n in (*first, GRID - sum(first)))


def high_level(trace: Trace) -> float:
    """The routing weight above which as many requests lie as the paper's rule loads in high precision."""
    weights = -np.sort(-trace.weights.astype(np.float64), axis=2)
    total = np.maximum(weights.sum(2, keepdims=True), 1e-12)
    stronger = (np.cumsum(weights, axis=2) - weights) / total
    share = float((stronger <= T1).mean())
    return float(np.quantile(weights, 1 - share))
