"""What a partition of one expert is, what it costs, and which inputs are accepted.

Shapes: T tokens, f neurons of the expert, N = n_sub sub-experts of m = f / N neurons. `mass` [T, f] holds |activations|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptError, UsageError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Partition:
    """perm int32 [f]: sub-expert n owns neurons perm[n*f/N : (n+1)*f/N]. cost: `cost()` of it. trace: (step, cost) as solved."""

    perm: Ints
    cost: float
    trace: tuple[tuple[float, float], ...] = ()


class Solver(Protocol):
    """Cut one expert into n_sub equal sub-experts so that leaving out the `dropped` weakest per token costs least.

    mass: float32 [T, f], C-contiguous, |activations|. Same arguments, same result.
    Raises UsageError for a shape or count that cannot be met, CorruptError for values that are not finite and non-negative.
    """

    def __call__(self, mass: Floats, n_sub: int, dropped: int, seed: int, **options: Any) -> Partition: ...


def check_mass(mass: Floats) -> Floats:
    """The matrix as float32, C-contiguous. Raises UsageError (form) or CorruptError (values)."""
    if mass.ndim != 2 or mass.size == 0:
        raise UsageError(f"activation mass has shape {mass.shape}", "give a non-empty [tokens, neurons] matrix")
    mass = np.ascontiguousarray(mass, dtype=np.float32)
    # One sum answers both: it is not finite if any value is not (or if sums overflow float64, which float32 data cannot do).
    if not np.isfinite(mass.sum(dtype=np.float64)):
        raise CorruptError("activation mass holds NaN or infinite values", "calibrate again, in float32 if the model overflows")
    if mass.min() < 0:
        raise CorruptError("activation mass holds negative values", "pass absolute activations")
    return mass


def check_blocks(width: int, n_sub: int, of: str = "an expert") -> None:
    """n_sub equal blocks must exist. Raises UsageError; of: whose neurons they are."""
    if n_sub < 2 or width % n_sub:
        legal = [n for n in range(2, min(width, 64) + 1) if width % n == 0] or [width]
        raise UsageError(f"{width} neurons of {of} do not split into {n_sub} equal sub-experts", f"choose n_sub from {legal}")


def check_problem(mass: Floats, n_sub: int, dropped: int) -> Floats:
    """Every check a solver makes before it starts; returns the matrix as float32, C-contiguous."""
    mass = check_mass(mass)
    check_blocks(mass.shape[1], n_sub)
    if not 1 <= dropped < n_sub:
        raise UsageError(f"cannot price {dropped} dropped of {n_sub} sub-experts", f"choose dropped from 1 to {n_sub - 1}")
    return mass


def check_perm(perm: NDArray[Any], width: int) -> None:
    """Raises CorruptError unless perm is a permutation of range(width)."""
    if perm.shape != (width,) or not np.array_equal(np.sort(perm), np.arange(width)):
        raise CorruptError(f"partition is not a permutation of {width} neurons", "solve it again")


def block_norms(mass: Floats, perm: NDArray[Any], n_sub: int) -> Doubles:
    """L1 norm of every sub-expert's activations, float64 [T, N]: L of spec 4.1."""
    tokens = mass.shape[0]
    out = np.empty((tokens, n_sub))
    for n, block in enumerate(np.split(perm, n_sub)):
        out[:, n] = mass[:, block].sum(1, dtype=np.float64)
    return out


def cost(mass: Floats, perm: NDArray[Any], n_sub: int, dropped: int) -> float:
    """Sum over tokens of the `dropped` smallest block norms, in units of activation (arXiv 2510.19366, Eq. 2), from scratch."""
    norms = block_norms(mass, perm, n_sub)
    return float(np.partition(norms, dropped - 1, axis=1)[:, :dropped].sum())


def cost_share(mass: Floats, perm: NDArray[Any], n_sub: int, dropped: int) -> float:
    """`cost` as a share of the total mass, 0..1; 0 for an expert that is silent everywhere."""
    total = float(mass.sum(dtype=np.float64))
    return cost(mass, perm, n_sub, dropped) / total if total else 0.0


def perm_of(owner: NDArray[Any], n_sub: int) -> Ints:
    """The canonical permutation of an assignment owner [f] -> sub-expert: blocks by first neuron, neurons ascending."""
    blocks = sorted((np.flatnonzero(owner == n) for n in range(n_sub)), key=lambda b: int(b[0]))
    return np.concatenate(blocks).astype(np.int32)


def owner_of(perm: NDArray[Any], n_sub: int) -> Ints:
    """The sub-expert of every neuron, int32 [f]: the inverse view of a permutation."""
    owner = np.empty(perm.shape[0], np.int32)
    owner[perm] = np.repeat(np.arange(n_sub, dtype=np.int32), perm.shape[0] // n_sub)
    return owner


def result(mass: Floats, owner: NDArray[Any], n_sub: int, dropped: int, trace: list[tuple[float, float]]) -> Partition:
    """A Partition from an assignment; its cost is recomputed from scratch in float64."""
    perm = perm_of(owner, n_sub)
    final = cost(mass, perm, n_sub, dropped)
    return Partition(perm, final, (*trace, (trace[-1][0] if trace else 0.0, final)))
