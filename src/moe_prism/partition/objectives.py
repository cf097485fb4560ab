"""What a partition is asked to keep together: each objective turns recorded activations into the mass the solvers divide."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .base import Floats


class Objective(Protocol):
    """mass [T, f] = |activations|, weight [T] = routing weights, down_norms [f] = ||W_down[:, j]|| -> mass [T, f], float32."""

    def __call__(self, mass: Floats, weight: Floats, down_norms: Floats) -> Floats: ...


def paper(mass: Floats, weight: Floats, down_norms: Floats) -> Floats:
    """The activations as they are (arXiv 2510.19366, Eq. 2)."""
    return mass


def output(mass: Floats, weight: Floats, down_norms: Floats) -> Floats:
    """|a_j| ||W_down[:, j]||: what a neuron can add to the output."""
    return np.ascontiguousarray(mass * down_norms, dtype=np.float32)


def router(mass: Floats, weight: Floats, down_norms: Floats) -> Floats:
    """Tokens count by their routing weight: what the layer's output sees."""
    return np.ascontiguousarray(mass * np.abs(weight)[:, None], dtype=np.float32)


def output_router(mass: Floats, weight: Floats, down_norms: Floats) -> Floats:
    """Both."""
    return router(output(mass, weight, down_norms), weight, down_norms)
