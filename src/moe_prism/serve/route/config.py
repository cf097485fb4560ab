"""`pool.yaml`: the models of a pool, who chooses among them, and the bounds. One form, closed, with a bound on every value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from annotated_types import MaxLen, MinLen
from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, field_validator, model_validator

from ...errors import UsageError
from ...pool import Chooser, choosers
from ...schema.common import Amount, Form, Name, Plain
from ...schema.lines import Lines, Place, mapping_in, nearest, told
from ..config import HttpBounds

NEXT = "see docs/how-to/route-between-models.md"
WHAT = "a mapping with 'upstreams'"
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$")]
"""A model's name in a pool: no sign in it separates a quality."""
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class UpstreamForm(Form):
    """One model of the pool. url: of an OpenAI endpoint; model: its name there, default: the first that it lists.

    key_variable: the environment variable that holds its key. levels: of its quality levels those that are used; default: all that it
    lists. quality: of its highest level, on one scale for the whole pool; cost: of a token there, in one unit for the whole pool.
    energy: of keeping it ready, default: its cost. requests: that it may have at once.
    """

    name: Label
    url: Annotated[str, StringConstraints(min_length=8, max_length=512)]
    model: Name | None = None
    key_variable: Variable | None = None
    levels: Annotated[list[Name], MinLen(1), MaxLen(64)] | None = None
    quality: Annotated[float, Field(gt=0, le=1)] = 1.0
    cost: Annotated[float, Field(ge=0, le=1e12)] = 1.0
    energy: Annotated[float, Field(ge=0, le=1e12)] | None = None
    requests: Annotated[int, Field(ge=1, le=65_536)] = 64

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            is_plain = False
        if not is_plain or set(url) & {*"@?#\\"} or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("is no plain http address, such as http://127.0.0.1:8001/v1")
        url = url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"


class PoolLimitsForm(Form):
    """What the options that a chooser takes may need. seconds: of a recorded question on average; energy: of all models together."""

    seconds: Seconds | None = None
    energy: Amount | None = None


class PoolBounds(HttpBounds):
    """Of the router. connect_seconds, first_byte_seconds: for an upstream to take a request, and to begin its answer; idle_seconds: between
    two parts of it. probe_seconds: between two looks at every upstream. tries: upstreams that one request may be sent to. answer_bytes:
    of an upstream's whole answer.
    """

    model_config = ConfigDict(strict=True)

    connect_seconds: Seconds = 2.0
    first_byte_seconds: Seconds = 60.0
    idle_seconds: Seconds = 60.0
    probe_seconds: Seconds = 2.0
    tries: int = Field(default=3, ge=1, le=64)
    answer_bytes: int = Field(default=16 << 20, ge=1024, le=1 << 32)


class PoolForm(Form):
    """A pool. chooser: of `moe-prism ls choosers`; settings: its parameters; record: a file of `--measure`, from this file's folder."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    name: Label = "pool"
    chooser: Name = "cheapest"
    settings: Plain = Field(default_factory=dict)
    record: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None
    limits: PoolLimitsForm = PoolLimitsForm()
    upstreams: Annotated[list[UpstreamForm], MinLen(1), MaxLen(64)]
    bounds: PoolBounds = PoolBounds()

    @model_validator(mode="after")
    def _names_differ(self) -> PoolForm:
        names = [self.name, *(each.name for each in self.upstreams)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two things are called '{twice}'")
        return self


@dataclass(frozen=True)
class PoolFile:
    """What a file says. settings: the chooser's parameters; record: None where there is none."""

    form: PoolForm
    chooser: type[Chooser]
    settings: Any
    record: Path | None


def read_pool(path: Path) -> PoolFile:
    """UsageError names the file, the line, and the nearest known key of what is wrong."""
    data, lines = mapping_in(path, WHAT, NEXT, "pool")
    name = str(path)
    try:
        form = PoolForm.model_validate(data)
    except ValidationError as error:
        raise told(error, lines, name, _owner, NEXT, "pool") from error
    known = choosers.names()
    if form.chooser not in known:
        raise UsageError(f"{name}:{lines.get(('chooser',), 1)}: no chooser '{form.chooser}'", nearest(form.chooser, known))
    chooser = choosers.get(form.chooser)
    record = None if form.record is None else path.parent / form.record
    return PoolFile(form, chooser, _settings(chooser, form, lines, name), record)


def _settings(chooser: type[Chooser], form: PoolForm, lines: Lines, name: str) -> Any:
    known = [field.name for field in fields(chooser.Parameters)]
    for key in form.settings:
        if key not in known:
            where = f"{name}:{lines.get(('settings', key), 1)}"
            said = nearest(key, known) if known else "leave settings out"
            raise UsageError(f"{where}: chooser '{form.chooser}' has no setting '{key}'", said)
    try:
        return TypeAdapter(chooser.Parameters).validate_python(form.settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{name}:{lines.get(('settings', *first['loc'][:1]), 1)}"
        raise UsageError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}", NEXT) from error


def _owner(place: Place) -> tuple[str, int, Sequence[str]]:
    """Whose key a place is."""
    if place[:1] == ("upstreams",) and len(place) > 2:
        return "an upstream", 2, list(UpstreamForm.model_fields)
    if len(place) > 1 and place[0] in ("limits", "bounds"):
        return str(place[0]), 1, list((PoolLimitsForm if place[0] == "limits" else PoolBounds).model_fields)
    return "", 0, list(PoolForm.model_fields)
