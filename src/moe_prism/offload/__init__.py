"""Offloading: traces of routing, eviction policies, prediction, and what they are worth on a trace."""

from .base import Access, CacheCounts, CachePolicy, ExpertCache, Load, Moment
from .cache import LayerPools, Pool, cache_policies
from .keys import KeySpace
from .predict import Predictor, predictors
from .replay import Prefetch, ReplayOptions, replay
from .trace import Trace, load_trace

__all__ = [
    "Access",
    "CacheCounts",
    "CachePolicy",
    "ExpertCache",
    "KeySpace",
    "LayerPools",
    "Load",
    "Moment",
    "Pool",
    "Predictor",
    "Prefetch",
    "ReplayOptions",
    "Trace",
    "cache_policies",
    "load_trace",
    "predictors",
    "replay",
]
