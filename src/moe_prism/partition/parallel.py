"""Many experts at once. The kernels hold no lock, so threads are enough, and who runs where changes no result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from ..cores import cores
from ..errors import UsageError
from .base import Floats, Partition

Source = Floats | Callable[[], Floats]


class Solve(Protocol):
    """A `Solver` bound to its counts and options."""

    def __call__(self, mass: Floats, *, seed: int) -> Partition: ...


def expert_seed(seed: int, layer: int, expert: int) -> int:
    """One independent 32-bit seed per expert, the same whatever else is solved and in whatever order."""
    return int(np.random.SeedSequence([seed, layer, expert]).generate_state(1)[0])


def solve_layer(
    masses: Mapping[int, Source], solve: Solve, *, layer: int = 0, seed: int = 0, threads: int | None = None
) -> dict[int, Partition]:
    """Partition of every expert id in `masses`, in its order.

    masses: |activations| float32 [T_e, f] per expert, or a function that makes them when a thread gets to it (bounded memory).
    solve: a solver that knows all but the mass and the seed. threads: None = one per core that
    this process may use. The first error of any expert is raised.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads={threads}", "give at least 1, or leave it out for one per core")

    def one(expert: int) -> Partition:
        source = masses[expert]
        mass = source() if callable(source) else source
        return solve(mass, seed=expert_seed(seed, layer, expert))

    with ThreadPoolExecutor(threads or cores()) as pool:
        return dict(zip(masses, pool.map(one, masses), strict=True))
