"""How many tokens to draft next: the number that gave the most tokens per second here, none where drafting loses.

Everything is measured while the request runs: what a plain step, a drafted token and a check of n + 1 tokens take, and how often a drafted
token is kept. What is not chosen is measured again after a while, and after twice as long each time that it still loses. Pure: seconds
come from outside.
"""

from __future__ import annotations

from collections import deque
from statistics import median

MEMORY = 9  # last measurements of each kind; the median of them counts
FADE = 0.97  # weight of what was kept before, per drafted token that was checked
FIRST = 3  # plain steps, and rounds of the longest draft, before a choice is made
AGAIN = 32  # plain steps, or rounds, until the other is measured again
SELDOM = 32 * AGAIN  # the longest such while


class Pace:
    """most: the longest draft that is tried."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._plain: deque[float] = deque(maxlen=MEMORY)
        self._draft: deque[float] = deque(maxlen=MEMORY)
        self._check: dict[int, deque[float]] = {}
        self._kept, self._tried = 0.0, 0.0
        self._since, self._while = 0, AGAIN
        self._was_plain = self._loses = True

    @property
    def kept(self) -> float:
        """Share of drafted tokens that are kept, of those whose predecessors were: 1 before any was tried."""
        return self._kept / self._tried if self._tried else 1.0

    def plain(self, seconds: float) -> None:
        """A step of one token took so long."""
        self._plain.append(seconds)
        self._count(True)

    def drafted(self, seconds: float) -> None:
        """One token of a draft took so long."""
        self._draft.append(seconds)

    def checked(self, drafted: int, seconds: float) -> None:
        """The check of a draft of so many tokens took so long."""
        self._check.setdefault(drafted, deque(maxlen=MEMORY)).append(seconds)
        self._count(False)

    def outcome(self, drafted: int, kept: int) -> None:
        """How many tokens of a draft were kept."""
        tried = min(drafted, kept + 1)
        fade = FADE**tried
        self._kept, self._tried = fade * self._kept + kept, fade * self._tried + tried

    def _count(self, is_plain: bool) -> None:
        self._since = self._since + 1 if is_plain == self._was_plain else 1
        self._was_plain = is_plain

    def choose(self) -> int:
        """Tokens to draft now; 0: a plain step."""
        if len(self._plain) < FIRST:
            return 0
        if sum(map(len, self._check.values())) < FIRST or not self._draft:
            return self.most
        best = max(range(self.most + 1), key=self.rate)
        if (best == 0) != self._loses:  # another winner
            self._loses, self._while = best == 0, AGAIN
        if self._since >= self._while and (best == 0) == self._was_plain:
            self._while = min(2 * self._while, SELDOM)
            return self._other(best)
        return best

    def _other(self, best: int) -> int:
        """What has not been measured for long: a plain step, or the draft that would be best of those."""
        return 0 if best else max(range(1, self.most + 1), key=self.rate)

    def rate(self, drafted: int) -> float:
        """Expected tokens per second of a draft of so many."""
        if drafted == 0:
            return 1 / median(self._plain)
        share = min(self.kept, 0.999)
        tokens = (1 - share ** (drafted + 1)) / (1 - share)
        return tokens / (drafted * median(self._draft) + self._checking(drafted))

    def _checking(self, drafted: int) -> float:
        """Seconds of a check, on a line through the nearest numbers that were measured; a plain step checks none."""
        known = {0: median(self._plain), **{n: median(times) for n, times in self._check.items()}}
        if drafted in known:
            return known[drafted]
        low = max(n for n in known if n < drafted)
        high = min((n for n in known if n > drafted), default=None)
        if high is None:
            high, low = low, max((n for n in known if n < low), default=0)
        if high == low:
            return known[low]
        return known[low] + (known[high] - known[low]) * (drafted - low) / (high - low)
