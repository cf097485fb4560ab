"""EdgeMoE's activation dictionary (arXiv 2308.14352): the experts of the two layers before say which come next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np

from ..keys import KeySpace
from ..trace import Array, Trace
from .base import Predictor, Seen, checked, chosen

SMOOTHING = 8.0  # observations the less specific table counts as


class Dictionary(Predictor):
    """Mean over pairs (a, b) of experts chosen two and one layers before of P(expert | a, b).

    The paper's models use one expert per token, whose pair is the key; with k of them the sets are too many, hence the mean over
    pairs. A pair's table is smoothed by P(expert | b), that one by P(expert).
    """

    first_layer = 1

    def __init__(self, one: Array, two: Array) -> None:
        """one [L, E, E] by the layer before; two [L, E, E, E] by the two before."""
        self.one, self.two = one, two

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace) -> Self:
        used = [chosen(trace, layer) for layer in range(space.layers)]
        e = space.experts
        one, two = np.zeros((space.layers, e, e), np.float32), np.zeros((space.layers, e, e, e), np.float32)
        for layer in range(1, space.layers):
            before, now = used[layer - 1], used[layer]
            one[layer] = _smoothed(before.T @ now, before.sum(0), now.mean(0))
            if layer > 1:
                pairs = (used[layer - 2][:, :, None] * before[:, None]).reshape(len(now), -1)
                two[layer] = _smoothed((pairs.T @ now).reshape(e, e, e), pairs.sum(0).reshape(e, e), one[layer])
        return cls(one, two)

    def arrays(self) -> dict[str, Array]:
        return {"one": self.one, "two": self.two}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], space: KeySpace, hidden: int) -> Self:
        e = space.experts
        return cls(**checked(arrays, {"one": (space.layers, e, e), "two": (space.layers, e, e, e)}))

    def at(self, layer: int, seen: Seen) -> Array:
        last = _onehot(seen.expert_ids[:, layer - 1], self.one.shape[1])
        if layer == 1:
            return np.asarray(last @ self.one[1])
        pairs = (_onehot(seen.expert_ids[:, layer - 2], self.one.shape[1])[:, :, None] * last[:, None]).reshape(len(last), -1)
        scores: Array = pairs @ self.two[layer].reshape(-1, self.one.shape[1])
        return scores


def _smoothed(counts: Array, total: Array, prior: Array) -> Array:
    smooth: Array = (counts + SMOOTHING * prior) / (total[..., None] + SMOOTHING)
    return smooth


def _onehot(ids: Array, experts: int) -> Array:
    out = np.zeros((len(ids), experts + 1), np.float32)
    np.put_along_axis(out, ids.astype(np.int64), 1, axis=1)
    return out[:, :-1]
