"""Fate's cross-layer gate (arXiv 2502.12224), training-free: the next layer's router on this layer's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from ..keys import KeySpace
from ..trace import Array, Trace
from .base import Predictor, Seen, checked, need_inputs


class CrossLayerGate(Predictor):
    """scores = router of `layer` applied to the router input of `layer - 1`, as that layer normalised it.

    Neighbouring layers add little to the residual stream, so their inputs point the same way.
    """

    needs_inputs = True
    needs_fit = False  # a store has the routers
    first_layer = 1

    def __init__(self, routers: Array) -> None:
        """routers [L, E, d]."""
        self.routers = routers

    @classmethod
    def fit(cls, trace: Trace, space: KeySpace) -> Self:
        return cls(need_inputs(trace)[1])

    def arrays(self) -> dict[str, Array]:
        return {"routers": self.routers}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], space: KeySpace, hidden: int) -> Self:
        return cls(**checked(arrays, {"routers": (space.layers, space.experts, hidden)}))

    def at(self, layer: int, seen: Seen) -> Array:
        assert seen.inputs is not None
        scores: Array = seen.inputs @ self.routers[layer].T
        return scores
