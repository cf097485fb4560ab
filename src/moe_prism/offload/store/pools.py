"""The cache of a store."""

from __future__ import annotations

from typing import Any

from ..base import CachePolicy, ExpertCache, KeySpace
from ..cache.pool import LayerPools
from .table import Slots, TablePool
from .units import UnitPool


def pools(
    policy: type[CachePolicy], space: KeySpace, slots: int, settings: dict[str, Any], places: Slots | None = None
) -> ExpertCache:
    """One pool per layer of equal size; one pool for all where a layer would not get a slot. A table where the policy has one."""
    layers, places = space.layers, places or Slots.new(len(space), slots)
    if slots < layers:
        return UnitPool(slots, policy(space, slots, **settings))
    quotas = [slots // layers + (layer < slots % layers) for layer in range(layers)]
    found = LayerPools(quotas, lambda _, capacity: policy(space, capacity, **settings))
    half_life = TablePool.half_life_of(policy(space, 1, **settings))
    if half_life is None:
        found.pools = [UnitPool(capacity, policy(space, capacity, **settings)) for capacity in quotas]
    else:
        found.pools = [TablePool(capacity, space.of_layer(layer), half_life, places) for layer, capacity in enumerate(quotas)]
    return found
