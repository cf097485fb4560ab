"""The settings of a pass, from what a calibration is asked for."""

from __future__ import annotations

from ..options.calibrate import CalibrateOptions
from .run import Settings

__all__ = ["CalibrateOptions", "settings"]


def settings(options: CalibrateOptions) -> Settings:
    """What a pass over the windows is run with."""
    names = tuple(options.collectors)
    memory, domains = options.memory_mib << 20, options.named_domains
    return Settings(names, capacity=options.reservoir, memory_bytes=memory, seed=options.seed, domains=domains)
