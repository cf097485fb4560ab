"""Neurons where they are: for a checkpoint whose order means something, and to see what a partition is worth."""

from __future__ import annotations

import numpy as np

from .base import Floats, Partition, check_problem, result


def solve(mass: Floats, n_sub: int, dropped: int, seed: int = 0) -> Partition:
    """The order of the checkpoint, cut into equal blocks. Neither mass nor seed has an effect."""
    mass = check_problem(mass, n_sub, dropped)
    return result(mass, np.repeat(np.arange(n_sub, dtype=np.int32), mass.shape[1] // n_sub), n_sub, dropped, [])
