"""Ten-line reference models: the worth of a key recomputed from the whole history, and the textbook's ARC."""

from __future__ import annotations

import math

from moe_prism.offload import KeySpace, Moment
from moe_prism.offload.cache.lfu import HALF_LIFE

Past = list[tuple[Moment, int, float]]
"""(when, key, weight) of all requests so far."""


def _steps(past: Past, key: int) -> list[int]:
    return [now.step for now, k, _ in past if k == key]


def lru(past: Past, key: int, now: Moment, space: KeySpace) -> float:
    return 0.0  # ties go to the least recently used


def lfu(past: Past, key: int, now: Moment, space: KeySpace) -> float:
    return sum(2 ** (-(now.step - s) / HALF_LIFE) for s in _steps(past, key))


def lfru(past: Past, key: int, now: Moment, space: KeySpace) -> float:
    steps = _steps(past, key)
    return len(steps) / (1 + now.step - steps[-1])


def edge_moe(past: Past, key: int, now: Moment, space: KeySpace) -> float:
    distance = next(a for a in range(1, space.layers + 1) if (now.layer + a) % space.layers == space.layer(key))
    return len(_steps(past, key)) / distance


def per_byte(past: Past, key: int, now: Moment, space: KeySpace) -> float:
    return sum(w * 2 ** (-(now.step - then.step) / HALF_LIFE) for then, k, w in past if k == key)


def static(past: Past, key: int, now: Moment, space: KeySpace) -> float:
    return PROFILE[key % len(PROFILE)]


PROFILE = [0.3, 0.1, 0.9, 0.4, 0.6, 0.2, 0.8]
MIX, HIGH = (0.4, 0.3, 0.2, 0.1), 0.5


def hobbit(past: Past, key: int, now: Moment, space: KeySpace) -> float:
    steps, total = _steps(past, key), now.step + 1
    high = sum(w >= HIGH for _, k, w in past if k == key)
    ahead = ((space.layer(key) - now.layer) % space.layers) / space.layers
    recent = steps[-1] + 1 if steps else 0
    return MIX[0] * recent / total + MIX[1] * len(steps) / total + MIX[2] * high / total + MIX[3] * (1 - ahead)


def reuse(past: Past, key: int, now: Moment, space: KeySpace) -> float:
    counts = (sum(2 ** (-(now.step - s) / h) for s in _steps(past, key)) for h in (8, 32, 512))
    return sum(math.log2(count + 0.05) for count in counts)


class TextbookARC:
    """Megiddo and Modha's figure 4, one request at a time; lists with the least recently used first."""

    def __init__(self, c: int) -> None:
        self.c, self.p = c, 0.0
        self.t1, self.t2, self.b1, self.b2 = [], [], [], []

    def replace(self, x: int) -> None:
        if self.t1 and (len(self.t1) > self.p or (x in self.b2 and len(self.t1) == self.p)):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def request(self, x: int) -> bool:
        if x in self.t1 or x in self.t2:
            (self.t1 if x in self.t1 else self.t2).remove(x)
            self.t2.append(x)
            return True
        for ghosts, other, sign in ((self.b1, self.b2, 1), (self.b2, self.b1, -1)):
            if x in ghosts:
                self.p = min(self.c, max(0, self.p + sign * max(1, len(other) / len(ghosts))))
                self.replace(x)
                ghosts.remove(x)
                self.t2.append(x)
                return False
        total = len(self.t1) + len(self.t2) + len(self.b1) + len(self.b2)
        if len(self.t1) + len(self.b1) == self.c:
            if len(self.t1) < self.c:
                self.b1.pop(0)
                self.replace(x)
            else:
                self.t1.pop(0)
        elif total >= self.c:
            if total == 2 * self.c:
                self.b2.pop(0)
            self.replace(x)
        self.t1.append(x)
        return False
