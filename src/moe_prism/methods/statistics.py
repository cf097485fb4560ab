"""What a pass over calibration text gathers, once for all methods that ask for the same."""

from __future__ import annotations

from ..calibrate.run import Pass, Settings
from ..calibrate.statistics import Statistics
from .base import Subject


def statistics_of(subject: Subject, names: tuple[str, ...]) -> Statistics:
    """The statistics of some collectors over the subject's calibration text."""
    key = f"statistics {' '.join(names)}"
    if key not in subject.cache:
        elastic = subject.elastic
        work = Pass(subject.model, [layer.parts.layer for layer in elastic.layers], Settings(collectors=names))
        try:
            with subject.report("calibrate") as update:
                work.run(subject.calibration, update)
        finally:
            for layer in elastic.layers:  # the pass took the hooks for itself
                layer.parts.layer.install(layer)
        subject.cache[key] = work.statistics()
    found: Statistics = subject.cache[key]
    return found
