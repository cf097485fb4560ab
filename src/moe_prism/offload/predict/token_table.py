"""Which experts a token id uses: the unigram table every learned path predictor has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np

from ...errors import CorruptError
from ..keys import KeySpace
from ..trace import Array, Trace
from .base import AGAIN, Predictor, Seen, checked, chosen

SMOOTHING = 2.0  # observations the layer's mean counts as


class TokenTable(Predictor):
    """P(expert | layer, token id), smoothed by P(expert | layer)."""

    def __init__(self, ids: Array, shares: Array, prior: Array) -> None:
        """ids [V] ascending; shares [V, L, E]; prior [L, E] for other ids."""
        self.ids, self.shares, self.prior = ids, shares, prior

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace) -> Self:
        ids, which = np.unique(trace.token, return_inverse=True)
        used = np.stack([chosen(trace, layer) for layer in range(space.layers)], axis=1)
        counts = np.zeros((len(ids), space.layers, space.experts), np.float32)
        np.add.at(counts, which, used)
        prior, total = used.mean(0), np.bincount(which)[:, None, None]
        return cls(ids.astype(np.int64), ((counts + SMOOTHING * prior) / (total + SMOOTHING)).astype(np.float32), prior)

    def arrays(self) -> dict[str, Array]:
        return {"ids": self.ids, "shares": self.shares, "prior": self.prior}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], space: KeySpace, hidden: int) -> Self:
        each = (space.layers, space.experts)
        found = checked(arrays, {"ids": (0,), "shares": (0, *each), "prior": each}, whole=("ids",))
        if len(found["ids"]) != len(found["shares"]) or (np.diff(found["ids"]) <= 0).any():
            raise CorruptError("the ids of the predictor's table are not one ascending id per row", AGAIN)
        return cls(**found)

    def at(self, layer: int, seen: Seen) -> Array:
        at = np.minimum(np.searchsorted(self.ids, seen.token), len(self.ids) - 1)
        known = self.ids[at] == seen.token
        return np.asarray(np.where(known[:, None], self.shares[at, layer], self.prior[layer]))
