"""Whether reading ahead pays, by trying: a few steps with it and a few without, in turns, while the store serves."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable

logger = logging.getLogger(__name__)

BLOCK, SETTLING = 10, 3
"""Steps of a turn, and those at its beginning that do not count: they still have, or lack, what the turn before has read."""
LEAST, MOST = 5, 20  # pairs of turns after which it may, and must, be decided
AGAIN = 5000  # steps after which it is tried again: other text, other load
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)
"""Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


class AheadTrial:
    """Says before every step whether to read ahead, and hears after it what it took.

    Pairs of turns are compared, so that a load which drifts hits both. It is decided when the 95 % interval of their difference leaves 0
    out, or after MOST pairs, and then by the mean; what makes no difference is not done.
    """

    def __init__(self, told: Callable[[bool, float], None] | None = None) -> None:
        """told: hears of a decision, and of the seconds per step that reading ahead adds."""
        self.told = told or _log
        self.decided: bool | None = None
        self._begin()

    def _begin(self) -> None:
        self._turns: list[float] = []  # mean of each, with and without in turns
        self._now: list[float] = []
        self._left = AGAIN

    @property
    def reads(self) -> bool:
        """Whether the next step reads ahead."""
        return len(self._turns) % 2 == 0 if self.decided is None else self.decided

    def note(self, seconds: float) -> None:
        """A step took so long."""
        if self.decided is not None:
            self._left -= 1
            if self._left <= 0:
                self.decided = None
                self._begin()
            return
        self._now.append(seconds)
        if len(self._now) == BLOCK:
            self._turns.append(statistics.median(self._now[SETTLING:]))
            self._now = []
            if len(self._turns) % 2 == 0:
                self._judge()

    def _judge(self) -> None:
        pairs = len(self._turns) // 2
        if pairs < LEAST:
            return
        more = [self._turns[2 * i] - self._turns[2 * i + 1] for i in range(pairs)]
        mean = statistics.fmean(more)
        half = T_95[pairs - 2] * statistics.stdev(more) / math.sqrt(pairs)
        if abs(mean) > half or pairs == MOST:
            self.decided = mean < 0
            self.told(self.decided, mean)


def _log(pays: bool, more: float) -> None:
    what = "goes on" if pays else "stops"
    logger.info("reading ahead %s: it made a step %.3f ms %s", what, 1e3 * abs(more), "longer" if more > 0 else "shorter")
