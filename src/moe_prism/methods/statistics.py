"""What a pass over calibration text gathers, once for all methods that ask for the same."""

from __future__ import annotations

from ..calibrate.run import Pass, Settings
from ..calibrate.statistics import Statistics
from .base import Subject


def statistics_of(subject: Subject, names: tuple[str, ...], capacity: int = Settings.capacity) -> Statistics:
    """The statistics of some collectors over the subject's calibration text. capacity: tokens per expert that a reservoir keeps."""
    key = f"statistics {' '.join(names)} {capacity}"
    if key not in subject.cache:
        elastic = subject.elastic
        work = Pass(subject.model, [layer.parts.layer for layer in elastic.layers], Settings(collectors=names, capacity=capacity))
        try:
            with subject.report("calibrate") as update:
                work.run(subject.calibration, update)
        finally:
            for layer in elastic.layers:  # the pass took the hooks for itself
                layer.parts.layer.install(layer)
        subject.cache[key] = work.statistics()
    found: Statistics = subject.cache[key]
    return found
