"""A cross-layer gate fitted in closed form (ours): what the router would say, from the input one layer before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np

from ..keys import KeySpace
from ..trace import Array, Trace
from .base import Predictor, Seen, checked, chosen, need_inputs

RIDGE = 10.0


class LearnedGate(Predictor):
    """scores = [x, 1] W with W [d + 1, E] the ridge regression of the 0/1 choices of `layer` on the input of `layer - 1`."""

    needs_inputs = True
    first_layer = 1

    def __init__(self, weights: Array) -> None:
        """weights [L, d + 1, E]."""
        self.weights = weights

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace) -> Self:
        inputs, _ = need_inputs(trace)
        zero = np.zeros((inputs.shape[2] + 1, space.experts))
        fitted = [zero, *(ridge(inputs[:, layer - 1], chosen(trace, layer), RIDGE) for layer in range(1, space.layers))]
        return cls(np.stack(fitted).astype(np.float32))

    def arrays(self) -> dict[str, Array]:
        return {"weights": self.weights}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], space: KeySpace, hidden: int) -> Self:
        return cls(**checked(arrays, {"weights": (space.layers, hidden + 1, space.experts)}))

    def at(self, layer: int, seen: Seen) -> Array:
        assert seen.inputs is not None
        return affine(seen.inputs, self.weights[layer])


def ridge(x: Array, y: Array, strength: float) -> Array:
    """[d + 1, n] least squares of y [T, n] on [x, 1], x [T, d]."""
    x = np.c_[x.astype(np.float64), np.ones(len(x))]
    fitted: Array = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)
    return fitted


def affine(x: Array, weights: Array) -> Array:
    """[x, 1] W."""
    out: Array = x @ weights[:-1] + weights[-1]
    return out
