"""The same guess for every token: how often each expert was used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np

from ..keys import KeySpace
from ..trace import Array, Trace
from .base import Predictor, Seen, checked, chosen


class Frequency(Predictor):
    """P(expert | layer)."""

    def __init__(self, shares: Array) -> None:
        """shares [L, E]."""
        self.shares = shares

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace) -> Self:
        return cls(np.stack([chosen(trace, layer).mean(0) for layer in range(space.layers)]))

    def arrays(self) -> dict[str, Array]:
        return {"shares": self.shares}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], space: KeySpace, hidden: int) -> Self:
        return cls(**checked(arrays, {"shares": (space.layers, space.experts)}))

    def at(self, layer: int, seen: Seen) -> Array:
        return np.tile(self.shares[layer], (len(seen.token), 1))
