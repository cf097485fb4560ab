"""The cache of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..offload.base import CachePolicy, ExpertCache, KeySpace
from ..offload.cache.declared import ranking_of
from ..offload.cache.pool import LayerPools
from ..offload.quotas import scaled
from .fast_pool import SlotTable, TablePool
from .unit_pool import UnitPool


@dataclass(frozen=True)
class Eviction:
    """Who leaves a store for others: a policy and its settings. group: keys that a token wants of a layer, see `is_shared`.

    quotas: in which proportion the layers share the slots, one number each; None = equal parts.
    """

    policy: type[CachePolicy]
    settings: dict[str, Any] = field(default_factory=dict)
    group: int = 1
    quotas: Sequence[int] | None = None


def is_shared(space: KeySpace, slots: int, group: int) -> bool:
    """Whether one pool serves all layers: where half of what a token wants of a layer (`group` keys) would not fit into one of its own.

    That one would be read through in many small pieces, and keep nothing.
    """
    return 2 * (slots // space.layers) < group


def policy_for(space: KeySpace, slots: int, group: int) -> str:
    """Who is evicted unless somebody says otherwise. A pool for all layers sees a sweep over them, which defeats recency and counts."""
    return "edge-moe" if is_shared(space, slots, group) else "lfu"


def pools(eviction: Eviction, space: KeySpace, slots: int, places: SlotTable | None = None) -> ExpertCache:
    """One pool per layer, or one for all of them (`is_shared`). Tables where the policy declares what they need.

    UsageError for quotas where one pool serves all layers.
    """
    policy, settings = eviction.policy, eviction.settings
    places = places or SlotTable.new(len(space), slots)

    def pool(capacity: int, of: range) -> ExpertCache:
        own = policy(space, capacity, **settings)
        ranking = ranking_of(own)
        return UnitPool(capacity, own) if ranking is None else TablePool(capacity, space, of, ranking, places)

    if is_shared(space, slots, eviction.group):
        if eviction.quotas is not None:
            raise UsageError(
                f"{slots} slots are too few for the quotas of {space.layers} layers",
                "give the experts more memory, or fit for this share",
            )
        return pool(slots, range(len(space)))
    layers = space.layers
    quotas = scaled(eviction.quotas or [1] * layers, slots, space.experts * space.parts)
    found = LayerPools(quotas, lambda _, capacity: policy(space, capacity, **settings))
    found.pools = [pool(capacity, space.of_layer(layer)) for layer, capacity in enumerate(quotas)]
    return found
