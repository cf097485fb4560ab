"""Many experts at once. The kernels hold no lock, so threads are enough, and who runs where changes no result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import UsageError
from .base import Floats, Partition, Solver

Source = Floats | Callable[[], Floats]


def expert_seed(seed: int, layer: int, expert: int) -> int:
    """One independent 32-bit seed per expert, the same whatever else is solved and in whatever order."""
    return int(np.random.SeedSequence([seed, layer, expert]).generate_state(1)[0])


def solve_layer(
    masses: Mapping[int, Source],
    n_sub: int,
    dropped: int,
    solver: Solver,
    *,
    layer: int = 0,
    seed: int = 0,
    threads: int | None = None,
    **options: Any,
) -> dict[int, Partition]:
    """Partition of every expert id in `masses`, in its order.

    masses: |activations| float32 [T_e, f] per expert, or a function that makes them when a thread gets to it (bounded memory).
    threads: None = one per core. options go to the solver. The first error of any expert is raised.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads={threads}", "give at least 1, or leave it out for one per core")

    def one(expert: int) -> Partition:
        source = masses[expert]
        mass = source() if callable(source) else source
        return solver(mass, n_sub, dropped, expert_seed(seed, layer, expert), **options)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return dict(zip(masses, pool.map(one, masses), strict=True))
