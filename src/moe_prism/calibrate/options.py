"""The settings of a pass, from what a calibration is asked for."""

from __future__ import annotations

from ..options.calibrate import CalibrateOptions
from .run import Settings

__all__ = ["CalibrateOptions", "settings"]


def settings(options: CalibrateOptions) -> Settings:
    # a pass in low memory reads every layer from disk once per batch, so it takes many windows at once
    """What a pass over the windows is run with."""
    batch = 64 if options.low_memory else 8
    names = tuple(options.collectors)
    memory, domains = options.memory_mib << 20, options.named_domains
    return Settings(names, capacity=options.reservoir, memory_bytes=memory, batch=batch, seed=options.seed, domains=domains)
