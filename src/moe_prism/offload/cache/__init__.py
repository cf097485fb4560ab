"""Eviction policies, one file each, and the cache they serve."""

from ...registry import Registry
from ..base import CachePolicy
from .pool import LayerPools, Pool

__all__ = ["LayerPools", "Pool", "cache_policies"]

cache_policies: Registry[type[CachePolicy]] = Registry(
    "cache-policy",
    {
        "lru": ("moe_prism.offload.cache.lru:LRU", "least recently used"),
        "lfu": ("moe_prism.offload.cache.lfu:LFU", "least frequently used, counts aged with a half-life of 16 steps"),
        "lfru": ("moe_prism.offload.cache.lfru:LFRU", "requests so far over steps since the last one"),
        "arc": ("moe_prism.offload.cache.arc:ARC", "adaptive replacement cache (textbook)"),
        "arc-fate": ("moe_prism.offload.cache.arc:FateARC", "ARC as in Fate's released code", "arXiv 2502.12224"),
        "fifo": ("moe_prism.offload.cache.fifo:FIFO", "first in, first out"),
        "random": ("moe_prism.offload.cache.random_:RandomVictim", "a random key"),
        "static": ("moe_prism.offload.cache.static:Static", "the least used on calibration text"),
        "edge-moe": (
            "moe_prism.offload.cache.edge_moe:EdgeMoE",
            "requests over the distance to the key's layer (corrected)",
            "arXiv 2308.14352",
        ),
        "hobbit": (
            "moe_prism.offload.cache.hobbit:Hobbit",
            "recency, frequency, importance and layer distance, fitted mix",
            "arXiv 2411.01433",
        ),
        "d2moe": (
            "moe_prism.offload.cache.d2moe:HighPlanesFirst",
            "lower bit planes before upper ones, least recently used first",
            "arXiv 2504.15299",
        ),
        "per-byte": ("moe_prism.offload.cache.per_byte:PerByte", "aged routing weight per byte"),
        "reuse": ("moe_prism.offload.cache.reuse:Reuse", "fitted mix of aged counts and what the layer's input predicts (ours)"),
        "sch": ("moe_prism.offload.cache.sch:SCH", "knows the next m steps (a bound, and the metric SCH)", "arXiv 2505.16056"),
        "belady": ("moe_prism.offload.cache.belady:Belady", "knows everything (the bound)"),
    },
)
