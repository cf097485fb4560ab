"""Not the next layer but the next steps: how much every expert of a layer will be used soon. Hints for the `reuse` policy."""

from __future__ import annotations

from typing import Self

import numpy as np

from ..keys import KeySpace
from ..trace import Array, Trace
from .base import chosen, need_inputs
from .learned_gate import affine, ridge

RIDGE = 100.0
DECAY = 0.7  # per step, of what counts as coming use


class ReusePredictor:
    """scores [T, L, E] = [x_l, 1] W_l: ridge regression of sum over j >= 1 of 0.7^j use(t + j) on the layer's own input x_l."""

    def __init__(self, weights: Array) -> None:
        """weights [L, d + 1, E]."""
        self.weights = weights

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace) -> Self:
        """Learn the mix from the routing of a trace."""
        inputs, _ = need_inputs(trace)
        fitted = [ridge(inputs[:, i], coming(chosen(trace, i), DECAY), RIDGE) for i in range(space.layers)]
        return cls(np.stack(fitted).astype(np.float32))

    def at(self, layer: int, inputs: Array) -> Array:
        """Scores [T, E] from inputs [T, d] of the layer itself."""
        return affine(inputs, self.weights[layer])

    def scores(self, trace: Trace) -> Array:
        """[T, L, E] of a whole trace."""
        inputs = need_inputs(trace)[0].astype(np.float32)
        return np.stack([self.at(layer, inputs[:, layer]) for layer in range(trace.layers)], axis=1)


def coming(used: np.ndarray, decay: float) -> np.ndarray:
    """[S, n] sum over j >= 1 of decay^j used[s + j]."""
    out, total = np.zeros(used.shape), np.zeros(used.shape[1])
    for step in range(len(used) - 1, -1, -1):
        out[step] = total
        total = (total + used[step]) * decay
    return out
