"""Request classes: what a kind of request is promised.

As YAML or a mapping, times in milliseconds and qualities 0..1 as in a request's fields:

    classes:
      interactive: {min_quality: 0.9, ttft_ms: 450, tpot_ms: 50, priority: 0}
      batch: {min_quality: 0.85, max_quality: 0.95, priority: 2}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UsageError
from ..schema.read import one_line
from ..schema.yaml import read_yaml
from .base import Job, Ladder


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
        raise UsageError(f"{where}: not a mapping of class names to fields", f"give each class some of: {FIELDS}")
    return {str(name): _read(str(name), fields, where) for name, fields in data.items()}


def load_classes(path: Path) -> dict[str, RequestClass]:
    """Classes under the key `classes` of a YAML file."""
    data = read_yaml(path)
    if not isinstance(data, Mapping) or "classes" not in data:
        raise UsageError(f"{path} has no key 'classes'", "see docs/reference/serving.md")
    return read_classes(data["classes"], str(path))


class _Form(BaseModel):
    """A class as it is written, times in milliseconds."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    min_quality: float | None = Field(default=None, ge=0, le=1)
    max_quality: float | None = Field(default=None, ge=0, le=1)
    ttft_ms: float | None = Field(default=None, ge=1e-3, le=1e9)
    tpot_ms: float | None = Field(default=None, ge=1e-3, le=1e9)
    priority: int = Field(default=0, ge=-1000, le=1000)


FIELDS = ", ".join(_Form.model_fields)


def _read(name: str, data: object, where: str) -> RequestClass:
    place = f"{where}: class '{one_line(name)}'"
    try:
        form = _Form.model_validate(data)
    except ValidationError as error:
        raise _explained(error, place) from error
    low, high = 0.0 if form.min_quality is None else form.min_quality, 1.0 if form.max_quality is None else form.max_quality
    if low > high:
        raise UsageError(f"{place}: min_quality {low} is above max_quality {high}", "lower one or raise the other")
    return RequestClass(
        name, low, high, form.ttft_ms and form.ttft_ms / 1000, form.tpot_ms and form.tpot_ms / 1000, form.priority
    )


def _explained(error: ValidationError, place: str) -> UsageError:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    if not first["loc"]:
        return UsageError(f"{place} is not a mapping", f"give it some of: {FIELDS}")
    name = one_line(str(first["loc"][0]))
    if first["type"] == "extra_forbidden":
        return UsageError(f"{place} has no field '{name}'", f"choose from: {FIELDS}")
    return UsageError(f"{place}: {name} is {first['input']!r}", first["msg"].replace("Input", "it"))
