"""How many slots each layer gets: from its own miss curve, or from what a predictor says it will need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UsageError
from .base import CachePolicy, KeySpace
from .cache.pool import LayerPools
from .replay import groups, serve
from .trace import Array, Trace


def miss_curves(
    trace: Trace, policy: type[CachePolicy], sizes: Sequence[int], space: KeySpace, settings: Mapping[str, Any] | None = None
) -> Array:
    """[L, sizes] misses of every layer with that many slots of its own."""
    work = list(groups(trace, space))
    out = np.zeros((space.layers, len(sizes)), np.int64)
    for at, size in enumerate(sizes):
        cache = LayerPools([size] * space.layers, lambda _, slots: policy(space, slots, **(settings or {})))
        for group in work:
            serve(cache, group, space.layers)
        out[:, at] = [pool.counts.misses for pool in cache.pools]
    return out


def quotas(curves: Array, sizes: Sequence[int], total: int) -> list[int]:
    """The size of every layer (one of `sizes`, ascending) with the fewest misses in all, whose sum is at most `total`.

    Exact dynamic programme over layers, O(L total len(sizes)). UsageError if even the smallest sizes do not fit.
    """
    layers = len(curves)
    if total < layers * sizes[0]:
        raise UsageError(f"{total} slots are too few for {layers} layers of at least {sizes[0]}", "give the cache more memory")
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    picks = np.zeros((layers, total + 1), np.int64)
    for layer in range(layers):
        options = np.full((len(sizes), total + 1), np.inf)
        for at, size in enumerate(sizes):
            if size <= total:
                options[at, size:] = best[: total + 1 - size] + curves[layer, at]
        picks[layer] = options.argmin(0)
        best = options.min(0)
    left, found = int(best.argmin()), []
    for layer in range(layers - 1, -1, -1):
        found.append(int(sizes[int(picks[layer, left])]))
        left -= found[-1]
    return found[::-1]


def needed(used: Array, slots: int) -> list[float]:
    """Keys of each layer that a run of steps needs, on average (ExpertFlow, arXiv 2410.17954). used: bool [L, S, keys].

    The runs are the longest whose keys fit into `slots` together: longer ones would say that every layer needs all.
    """
    found, length = [float(own.sum(1).mean()) for own in used], 2
    while length <= used.shape[1]:
        whole = used.shape[1] // length * length
        longer = [float(own[:whole].reshape(-1, length, own.shape[1]).any(1).sum(1).mean()) for own in used]
        if sum(longer) > slots:
            break
        found, length = longer, length + 1
    return found


def likeliest(scores: Array, count: int) -> Array:
    """bool [S, keys]: the `count` keys with the largest scores [S, keys] of every step."""
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, np.argsort(-scores, axis=1, kind="stable")[:, :count], True, axis=1)
    return found


def scaled(shares: Sequence[float], slots: int, most: int) -> list[int]:
    """Quotas in the proportion of `shares` that sum to `slots` (to layers x most if that is less), each between 1 and `most`.

    What rounding leaves goes to the largest remainders. UsageError where there is less than one slot per layer.
    """
    layers, total = len(shares), sum(shares)
    if slots < layers:
        raise UsageError(f"{slots} slots are too few for quotas of {layers} layers", "give the experts more memory")
    exact = [slots * share / total for share in shares]
    found = [min(most, max(1, int(e))) for e in exact]
    by_remainder = sorted(range(layers), key=lambda i: (found[i] - exact[i], i))
    target = min(slots, layers * most)
    while sum(found) != target:
        step = 1 if sum(found) < target else -1
        for i in by_remainder if step > 0 else reversed(by_remainder):
            if sum(found) != target and 1 <= found[i] + step <= most:
                found[i] += step
    return found
