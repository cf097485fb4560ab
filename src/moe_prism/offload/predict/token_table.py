"""Which experts a token id uses: the unigram table every learned path predictor has to beat."""

from __future__ import annotations

from typing import Self

import numpy as np

from ..keys import KeySpace
from ..trace import Array, Trace
from .base import Predictor, Seen, chosen

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
        return cls(ids, ((counts + SMOOTHING * prior) / (total + SMOOTHING)).astype(np.float32), prior)

    def at(self, layer: int, seen: Seen) -> Array:
        at = np.minimum(np.searchsorted(self.ids, seen.token), len(self.ids) - 1)
        known = self.ids[at] == seen.token
        return np.asarray(np.where(known[:, None], self.shares[at, layer], self.prior[layer]))
