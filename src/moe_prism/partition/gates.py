"""Which r neurons stand for a sub-expert at run time, and the order that puts them first in its block.

Shapes: T tokens, f neurons, N sub-experts of m = f / N neurons. A choice scores the neurons of one block; the r highest win.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .base import Doubles, Floats, Ints, check_blocks, check_mass, check_perm


class GateChoice(Protocol):
    """Score [m] of the neurons of one block from their mass [T, m] and ||W_down[:, j]|| [m] (None: all equal)."""

    def __call__(self, mass: Floats, down_norms: Floats | None) -> Doubles: ...


def energy(mass: Floats, down_norms: Floats | None) -> Doubles:
    """Mean over tokens of (a_j * ||W_down[:, j]||)^2: what the neuron itself puts into the output."""
    power: Doubles = np.square(mass, dtype=np.float64).mean(0)
    return power if down_norms is None else power * np.square(down_norms, dtype=np.float64)


def centrality(mass: Floats, down_norms: Floats | None = None, *, active: float = 0.75) -> Doubles:
    """Co-activation with the rest of the block (arXiv 2510.19366 section 4.2), its own count excluded as the paper writes it.

    active: a neuron is active at a token when among the largest `active` share of its *own sub-expert's* neurons there, the
    variant behind the released configurations; the paper's text ranks over the whole expert, which says less about one block.
    """
    width = mass.shape[1]
    count = round(active * width)
    if not 1 <= count <= width:
        raise UsageError(f"an active share of {active} marks {count} of {width} neurons", "choose a share above 0 and up to 1")
    flags = np.zeros(mass.shape, np.float32)
    # Stable on the negated values, so that equal activations are taken by neuron id everywhere.
    top = np.argsort(-mass, axis=1, kind="stable")[:, :count]
    np.put_along_axis(flags, top, 1.0, axis=1)
    per_token = flags.sum(1, dtype=np.float64)
    # Row sum of Bm^T Bm without the diagonal, never building the m x m matrix.
    score: Doubles = flags.T.astype(np.float64) @ per_token - flags.sum(0, dtype=np.float64)
    return score


def order_gates(
    mass: Floats, perm: NDArray[np.integer], n_sub: int, r: int, choice: GateChoice = energy, down_norms: Floats | None = None
) -> Ints:
    """perm with every block reordered: its r gate neurons by falling score, then the others by ascending id. int32 [f].

    mass: |activations| [T, f] in the expert's original neuron order, which perm [f] indexes; down_norms [f] likewise.
    r = 0 only sorts. Equal scores go to the lower id. Raises UsageError for an r or shape that does not fit.
    """
    mass = check_mass(mass)
    width = mass.shape[1]
    check_blocks(width, n_sub)
    check_perm(perm, width)
    if not 0 <= r <= width // n_sub:
        raise UsageError(f"{r} gate neurons do not fit a sub-expert of {width // n_sub}", f"choose r from 0 to {width // n_sub}")
    if down_norms is not None and down_norms.shape != (width,):
        raise UsageError(f"down_norms has shape {down_norms.shape}, the expert {width} neurons", "pass one norm per neuron")
    out = []
    for part in np.split(perm, n_sub):
        block = np.sort(part)
        score = choice(np.ascontiguousarray(mass[:, block]), None if down_norms is None else down_norms[block])
        first = block[np.argsort(-score, kind="stable")[:r]]
        out += [first, np.setdiff1d(block, first)]
    return np.concatenate(out).astype(np.int32)
