"""A partition for experts too few tokens reach: balanced k-means on the weights alone (spec moe-prism section 3)."""

from __future__ import annotations

import math

import numpy as np

from ..errors import CorruptError, UsageError
from .assign import balance
from .base import Doubles, Floats, Partition, check_blocks, perm_of
from .random_ import random_owner

ROUNDS = 50


def weight_fallback(gate_rows: Floats | None, up_rows: Floats, n_sub: int, seed: int = 0) -> Partition:
    """Group neurons whose rows [W_gate; W_up] point the same way. gate_rows (None: ungated), up_rows: [f, d].

    The cost is NaN: without activations there is no mass to price. Raises UsageError (shapes) or CorruptError (values).
    """
    rows = _unit_rows(gate_rows, up_rows)
    check_blocks(rows.shape[0], n_sub)
    owner = random_owner(rows.shape[0], n_sub, np.random.default_rng(seed))
    for _ in range(ROUNDS):
        centres = np.stack([rows[owner == n].mean(0) for n in range(n_sub)])
        # Nearest centre under equal sizes: |x|^2 is the same for all blocks and drops out.
        after = balance(rows @ centres.T - 0.5 * np.square(centres).sum(1))
        if np.array_equal(after, owner):
            break
        owner = after
    return Partition(perm_of(owner, n_sub), math.nan)


def _unit_rows(gate_rows: Floats | None, up_rows: Floats) -> Doubles:
    """Each half scaled to length 1 before they are joined, so that neither decides alone. float64 [f, d or 2d]."""
    halves = [up_rows] if gate_rows is None else [gate_rows, up_rows]
    if any(h.ndim != 2 or h.shape != up_rows.shape or h.size == 0 for h in halves):
        raise UsageError(
            f"weight rows have shapes {[h.shape for h in halves]}", "give gate and up rows as two equal [neurons, d] matrices"
        )
    joined = [np.asarray(h, np.float64) for h in halves]
    if not all(np.isfinite(h).all() for h in joined):
        raise CorruptError("expert weights hold NaN or infinite values", "restore the checkpoint from its source")
    return np.hstack([h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12) for h in joined])
