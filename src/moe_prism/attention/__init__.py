"""The cache of attention, where it is made smaller."""

from .ems import EmsCache, attending

__all__ = ["EmsCache", "attending"]
