"""Synthetic traces with known answers."""

from __future__ import annotations

import numpy as np

from moe_prism.offload.trace import DECODE, FORMAT, Trace


def make(ids: np.ndarray, *, experts: int, weights: np.ndarray | None = None, request: np.ndarray | None = None, **more) -> Trace:
    """A decode trace, one token per step, from expert ids [T, L, k]; requests of equal parts: request [T]."""
    tokens, layers, k = ids.shape
    if weights is None:
        weights = np.broadcast_to(np.linspace(1, 0.5, k) / k, ids.shape)
    request = np.zeros(tokens, np.int32) if request is None else request.astype(np.int32)
    starts = np.r_[True, np.diff(request) != 0]
    first = np.maximum.accumulate(np.where(starts, np.arange(tokens), 0))
    arrays = {
        "side": (np.arange(tokens) >= tokens // 2).astype(np.int8),
        "token": np.zeros(tokens, np.int32),
        "position": (np.arange(tokens) - first).astype(np.int32),
        "phase": np.full(tokens, DECODE, np.int8),
        "step": np.arange(tokens, dtype=np.int32),
    }
    arrays.update({name: more.pop(name) for name in list(more) if name in arrays})
    header = {"format": FORMAT, "layers": layers, "experts": experts, "k": k, "n_sub": more.pop("n_sub", 1)}
    return Trace(header, ids.astype(np.int16), weights.astype(np.float16), request=request, **arrays, **more)


def uniform(tokens: int, layers: int, experts: int, k: int, seed: int = 0) -> np.ndarray:
    """Every token k distinct experts, each set equally likely."""
    draw = np.random.default_rng(seed)
    return draw.random((tokens, layers, experts)).argsort(-1)[..., :k]


def sticky(tokens: int, layers: int, experts: int, k: int, *, stay: float = 0.9, seed: int = 0) -> np.ndarray:
    """Each token prefers the experts of a domain; the domain changes with probability 1 - stay."""
    draw = np.random.default_rng(seed)
    taste = draw.normal(size=(4, layers, experts)) * 1.5
    domain, out = 0, np.zeros((tokens, layers, k), np.int64)
    for t in range(tokens):
        if draw.random() > stay:
            domain = int(draw.integers(4))
        noisy = taste[domain] + draw.gumbel(size=(layers, experts))
        out[t] = (-noisy).argsort(-1)[:, :k]
    return out


def constant(tokens: int, layers: int, k: int) -> np.ndarray:
    return np.broadcast_to(np.arange(k), (tokens, layers, k)).copy()


def next_layer(tokens: int, layers: int, experts: int, seed: int = 0) -> np.ndarray:
    """k = 1; the first layer is random, every further one a fixed permutation of the one before."""
    draw = np.random.default_rng(seed)
    out = np.zeros((tokens, layers, 1), np.int64)
    out[:, 0, 0] = draw.integers(experts, size=tokens)
    for layer in range(1, layers):
        out[:, layer, 0] = draw.permutation(experts)[out[:, layer - 1, 0]]
    return out
