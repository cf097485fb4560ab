"""Adaptive replacement cache (Megiddo and Modha, FAST 2003), and the variant in Fate's released code."""

from __future__ import annotations

from collections.abc import Container

from ..base import CachePolicy, Key, Moment


class ARC(CachePolicy):
    """Two resident lists, keys requested once (t1) and more often (t2), each with a ghost list of what left it (b1, b2).

    A request of a ghost moves the target length of t1 towards the list that it left too early.
    """

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.t1: dict[Key, None] = {}  # least recently used first, as are all four
        self.t2: dict[Key, None] = {}
        self.b1: dict[Key, None] = {}
        self.b2: dict[Key, None] = {}
        self.target = 0.0
        self._from_b2 = False  # whether the key that needs room is a ghost of t2

    def used(self, key: Key, weight: float, now: Moment) -> None:
        self.t1.pop(key, None)
        self.t2.pop(key, None)
        self.t2[key] = None

    def missed(self, key: Key, weight: float, now: Moment) -> None:
        self._from_b2 = key in self.b2
        if key in self.b1:
            self.target = min(self.slots, self.target + self.step_up())
        elif self._from_b2:
            self.target = max(0.0, self.target - self.step_down())

    def step_up(self) -> float:
        return max(1.0, len(self.b2) / len(self.b1))

    def step_down(self) -> float:
        return max(1.0, len(self.b1) / len(self.b2))

    def first(self) -> bool:
        """Whether the victim comes from t1."""
        return len(self.t1) > self.target or (self._from_b2 and len(self.t1) == self.target)

    def victim(self, blocked: Container[Key], now: Moment) -> Key:
        lists = (self.t1, self.t2) if self.t1 and self.first() else (self.t2, self.t1)
        return next(key for each in lists for key in each if key not in blocked)

    def left(self, key: Key, now: Moment) -> None:
        resident, ghosts = (self.t1, self.b1) if key in self.t1 else (self.t2, self.b2)
        del resident[key]
        ghosts[key] = None

    def entered(self, key: Key, weight: float, now: Moment) -> None:
        ghost = key in self.b1 or key in self.b2
        self.b1.pop(key, None)
        self.b2.pop(key, None)
        (self.t2 if ghost else self.t1)[key] = None
        self._from_b2 = False
        while self.b1 and len(self.t1) + len(self.b1) > self.slots:
            del self.b1[next(iter(self.b1))]
        while self.b2 and sum(map(len, (self.t1, self.t2, self.b1, self.b2))) > 2 * self.slots:
            del self.b2[next(iter(self.b2))]


class FateARC(ARC):
    """The target moves by a whole list's length, and t1 gives way only above it, as in Fate's released code."""

    def step_up(self) -> float:
        return float(len(self.t1))

    def step_down(self) -> float:
        return float(len(self.t2))

    def first(self) -> bool:
        return len(self.t1) > self.target
