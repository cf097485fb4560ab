"""Request classes: what a kind of request is promised.

As YAML or a mapping, times in milliseconds and qualities 0..1 as in a request's fields:

    classes:
      interactive: {min_quality: 0.9, ttft_ms: 450, tpot_ms: 50, priority: 0}
      batch: {min_quality: 0.85, max_quality: 0.95, priority: 2}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..schema.yaml import read_yaml
from .base import Job, Ladder

FIELDS = ("min_quality", "max_quality", "ttft_ms", "tpot_ms", "priority")


@dataclass(frozen=True)
class RequestClass:
    """Qualities are shares of tokens as in `Level.quality`; targets are seconds, None for none."""

    name: str
    min_quality: float = 0.0
    max_quality: float = 1.0
    ttft: float | None = None
    tpot: float | None = None
    priority: int = 0  # smaller first

    def job(self, id: str, arrival: float, prompt: int, output: int, ladder: Ladder) -> Job:
        """A request of this class, served between the cheapest levels that reach its two qualities."""
        floor, ceiling = ladder.at_least(self.min_quality), ladder.at_least(self.max_quality)
        return Job(id, arrival, prompt, output, floor, ceiling, self.ttft, self.tpot, self.priority, self.name)

    def slower(self, factor: float) -> RequestClass:
        """The same class with its times multiplied, for a machine that is this much slower."""
        return replace(self, ttft=self.ttft and self.ttft * factor, tpot=self.tpot and self.tpot * factor)


def default_classes() -> dict[str, RequestClass]:
    """Three classes; times as guidellm and MLPerf publish them for chat and for content generation."""
    classes = (
        RequestClass("interactive", min_quality=0.9, ttft=0.45, tpot=0.05, priority=0),
        RequestClass("standard", min_quality=0.95, ttft=1.5, tpot=0.15, priority=1),
        RequestClass("batch", min_quality=0.85, priority=2),
    )
    return {c.name: c for c in classes}


def read_classes(data: object, where: str = "classes") -> dict[str, RequestClass]:
    """Classes from a mapping of name to fields. UsageError names the class and the field that is wrong."""
    if not isinstance(data, Mapping) or not data:
        raise UsageError(f"{where}: not a mapping of class names to fields", f"give each class some of: {', '.join(FIELDS)}")
    return {str(name): _read(str(name), fields, where) for name, fields in data.items()}


def load_classes(path: Path) -> dict[str, RequestClass]:
    """Classes under the key `classes` of a YAML file."""
    data = read_yaml(path)
    if not isinstance(data, Mapping) or "classes" not in data:
        raise UsageError(f"{path} has no key 'classes'", "see docs/reference/serving.md")
    return read_classes(data["classes"], str(path))


def _read(name: str, data: object, where: str) -> RequestClass:
    place = f"{where}: class '{name}'"
    if not isinstance(data, Mapping):
        raise UsageError(f"{place} is not a mapping", f"give it some of: {', '.join(FIELDS)}")
    unknown = [str(key) for key in data if key not in FIELDS]
    if unknown:
        raise UsageError(f"{place} has no field '{unknown[0]}'", f"choose from: {', '.join(FIELDS)}")
    low = _number(data, "min_quality", place, 0.0, 1.0)
    high = _number(data, "max_quality", place, 0.0, 1.0)
    ttft, tpot = (_number(data, key, place, 1e-3, 1e9) for key in ("ttft_ms", "tpot_ms"))
    priority = data.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > 1000:
        raise UsageError(f"{place}: priority is {priority!r}", "give a whole number from -1000 to 1000")
    low, high = 0.0 if low is None else low, 1.0 if high is None else high
    if low > high:
        raise UsageError(f"{place}: min_quality {low} is above max_quality {high}", "lower one or raise the other")
    return RequestClass(name, low, high, ttft and ttft / 1000, tpot and tpot / 1000, priority)


def _number(data: Mapping[Any, Any], key: str, place: str, low: float, high: float) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{place}: {key} is {value!r}", f"give a number from {low:g} to {high:g}")
    return float(value)
