"""What a policy costs that has no compiled table: it answers every request of a layer in Python."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace

import numpy as np

from ..offload.base import ExpertCache, KeySpace, Moment
from ..offload.cache.lru import LRU
from ..offload.cache.pool import LayerPools
from .fast_pool import TablePool
from .pools import Eviction, pools

REQUESTS, WARM = 64, 16  # of them, those that are not timed: the pool fills


def request_seconds(eviction: Eviction, space: KeySpace, slots: int) -> tuple[float, float] | None:
    """(seconds of a request of a layer under this policy, under `lru` in its table), medians; None where the policy has a table."""
    own = pools(eviction, space, slots)
    if isinstance(_pool(own, 0), TablePool):
        return None
    other = pools(replace(eviction, policy=LRU, settings={}), space, slots)
    return _median(own, space, eviction.group), _median(other, space, eviction.group)


def _pool(cache: ExpertCache, layer: int) -> ExpertCache:
    return cache.pools[layer] if isinstance(cache, LayerPools) else cache


def _median(cache: ExpertCache, space: KeySpace, group: int) -> float:
    """Of requests for as many keys as a token wants, or as fit."""
    draw, seconds = random.Random(0), []  # noqa: S311 - which keys are asked for
    for number in range(REQUESTS):
        layer, step = number % space.layers, number // space.layers
        pool, own = _pool(cache, layer), space.of_layer(layer)
        count = max(1, min(group, len(own), getattr(pool, "capacity", group)))
        keys = draw.sample(own, count)
        began = time.perf_counter()
        if isinstance(pool, TablePool):
            pool.serve(np.array(keys, np.int64), np.ones(count), Moment(number, step, layer))
        else:
            pool.request(keys, Moment(number, step, layer), [1.0] * count)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM:])
