"""What a trace asks for, at the qualities that are served."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..offload.trace import Trace
from .base import Demand


def wanted(trace: Trace) -> np.ndarray:
    """[T, L, k, N] which blocks of its experts every token computes."""
    chosen = trace.expert_ids >= 0
    if trace.kept is None:
        return np.repeat(chosen[..., None], trace.n_sub, 3)
    bits = trace.kept[..., None] >> np.arange(trace.n_sub, dtype=trace.kept.dtype)
    return np.asarray(chosen[..., None] & ((bits & 1) > 0))


def mixed(trace: Trace, full_share: float) -> Trace:
    """The trace with so many of its requests at full budget, spread evenly over them; the others as they were recorded."""
    if trace.kept is None or full_share == 0:
        return trace
    turn = np.floor((trace.request + 1) * full_share) > np.floor(trace.request * full_share)
    every = np.array((1 << trace.n_sub) - 1, trace.kept.dtype)
    return replace(trace, kept=np.where(turn[:, None, None], every, trace.kept))


def demand_of(trace: Trace) -> Demand:
    """Load and flow of all its tokens."""
    tokens, layers, _ = trace.expert_ids.shape
    blocks = np.zeros((layers, trace.experts, trace.n_sub))
    keep, here = wanted(trace), np.zeros((layers, tokens, trace.experts), np.float32)
    for layer in range(layers):
        ids = trace.expert_ids[:, layer].astype(np.int64)
        for n in range(trace.n_sub):
            used = keep[:, layer, :, n]
            blocks[layer, :, n] = np.bincount(ids[used], minlength=trace.experts)
        row, column = np.nonzero(keep[:, layer].any(2))
        here[layer, row, ids[row, column]] = 1
    flow = np.zeros((max(0, layers - 1), trace.experts, trace.experts))
    for layer, between in enumerate(flow):
        between[:] = here[layer].T @ here[layer + 1]
    return Demand(blocks, flow)
