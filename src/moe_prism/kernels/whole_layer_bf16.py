"""`whole_layer.py` over bfloat16 weights. Not part of it so that nobody compiles what he does not use."""

from __future__ import annotations

import numpy as np
from numba import njit

from .whole_layer import chosen, given


@njit(nogil=True, cache=True)
def run_chosen(
    by: int, past: int, budget: int, x: int, index: int, weight: int, tokens: int, k: int, keep: int, out: int, threads: int
) -> bool:
    """As there."""
    return chosen(by, past, budget, (x, index, weight, tokens, k), keep, out, threads, np.uint16(0))  # type: ignore[no-any-return]


@njit(nogil=True, cache=True)
def run_given(of: int, x: int, index: int, weight: int, tokens: int, k: int, keep: int, out: int, threads: int) -> bool:
    """As there."""
    return given(of, (x, index, weight, tokens, k), keep, out, threads, np.uint16(0))  # type: ignore[no-any-return]
