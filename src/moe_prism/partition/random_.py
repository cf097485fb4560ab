"""A uniformly random balanced partition: the floor every solver must clear."""

from __future__ import annotations

import numpy as np

from .base import Floats, Ints, Partition, check_problem, result


def solve(mass: Floats, n_sub: int, dropped: int, seed: int = 0) -> Partition:
    """Shuffle the neurons, cut into equal blocks."""
    mass = check_problem(mass, n_sub, dropped)
    return result(mass, random_owner(mass.shape[1], n_sub, np.random.default_rng(seed)), n_sub, dropped, [])


def random_owner(width: int, n_sub: int, rng: np.random.Generator) -> Ints:
    """Sub-expert of every neuron, int32 [f]."""
    return rng.permutation(np.repeat(np.arange(n_sub, dtype=np.int32), width // n_sub))
