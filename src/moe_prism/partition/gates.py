"""Which r neurons stand for a sub-expert at run time, and the order that puts them first in its block.

Shapes: T tokens, f neurons, N sub-experts of m = f / N neurons. A choice scores every neuron; the r highest of each block win.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .base import Doubles, Floats, Ints, check_blocks, check_mass, check_perm

ACTIVE = 0.75  # share of the neurons ranked that count as active at a token, as the paper writes


class GateChoice(Protocol):
    """Score [f] of an expert's neurons from their mass [T, f], the blocks [N, m] of neuron ids, and ||W_down[:, j]|| [f] or None."""

    def __call__(self, mass: Floats, blocks: NDArray[np.integer], down_norms: Floats | None) -> Doubles: ...


def energy(mass: Floats, blocks: NDArray[np.integer], down_norms: Floats | None) -> Doubles:
    """Mean over tokens of (a_j * ||W_down[:, j]||)^2: what the neuron itself puts into the output. Blocks do not matter."""
    power: Doubles = np.square(mass, dtype=np.float64).mean(0)
    return power if down_norms is None else power * np.square(down_norms, dtype=np.float64)


def centrality(mass: Floats, blocks: NDArray[np.integer], down_norms: Floats | None = None, *, share: float = ACTIVE) -> Doubles:
    """Co-activation with the rest of the block (arXiv 2510.19366 section 4.2), its own count excluded as the paper writes it.

    A neuron is active at a token when among the largest `share` of its *own sub-expert's* neurons there: the variant behind the
    released configurations.
    """
    score = np.empty(mass.shape[1])
    for block in blocks:
        score[block] = coactivation(active(mass[:, block], share))
    return score


def centrality_expert(
    mass: Floats, blocks: NDArray[np.integer], down_norms: Floats | None = None, *, share: float = ACTIVE
) -> Doubles:
    """The same with neurons ranked over the *whole expert*, as the paper's text reads."""
    flags = active(mass, share)
    score = np.empty(mass.shape[1])
    for block in blocks:
        score[block] = coactivation(flags[:, block])
    return score


def active(mass: Floats, share: float) -> Floats:
    """1 where a neuron is among the largest `share` of the columns at a token, [T, columns]; equal activations by column."""
    width = mass.shape[1]
    count = round(share * width)
    if not 1 <= count <= width:
        raise UsageError(f"an active share of {share} marks {count} of {width} neurons", "choose a share above 0 and up to 1")
    flags = np.zeros(mass.shape, np.float32)
    # Stable on the negated values, so that equal activations are taken by neuron id everywhere.
    top = np.argsort(-mass, axis=1, kind="stable")[:, :count]
    np.put_along_axis(flags, top, 1.0, axis=1)
    return flags


def coactivation(flags: Floats) -> Doubles:
    """Row sums of Bm^T Bm without its diagonal, never building the m x m matrix. flags [T, m] -> [m]."""
    per_token = flags.sum(1, dtype=np.float64)
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
    blocks = np.sort(perm.reshape(n_sub, -1), axis=1)
    score = choice(mass, blocks, down_norms)
    out = []
    for block in blocks:
        first = block[np.argsort(-score[block], kind="stable")[:r]]
        out += [first, np.setdiff1d(block, first)]
    return np.concatenate(out).astype(np.int32)
