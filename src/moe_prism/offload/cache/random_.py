"""A random victim: what a policy must beat to have a reason."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from ..base import Key, Moment
from .lru import LRU


class RandomVictim(LRU):
    """Evicts a uniformly drawn key; deterministic in the seed."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self._draw = np.random.default_rng(self.seed)

    def victim(self, blocked: Container[Key], now: Moment) -> Key:
        keys = [k for k in self.resident if k not in blocked]
        return keys[int(self._draw.integers(len(keys)))]
