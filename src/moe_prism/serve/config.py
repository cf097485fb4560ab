"""What an operator may set, in `qos.yaml` or on the command line. Defaults are for one small machine."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UsageError
from ..schedule.classes import RequestClass, default_classes, read_classes
from ..schema.yaml import read_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EngineLimits(_Strict):
    """What runs at once. Counts of requests and tokens."""

    requests: int = Field(default=64, ge=1, le=4096)
    step_tokens: int = Field(default=512, ge=16, le=65_536)
    cache_tokens: int = Field(default=32_768, ge=256, le=1 << 28)
    page: int = Field(default=32, ge=4, le=1024)
    prefix_cache: bool = True
    prefix_cache_per_key: bool = False
    """Prefixes are shared only among requests with the same key, so that their timing tells nothing of other tenants."""
    decoding: int = Field(default=4, ge=1, le=256)
    """Requests with a method of decoding that run at once, beside the batch; their caches take `cache_tokens` once more at most."""
    process: bool = os.name == "posix"
    """A process of its own for the engine, so that HTTP and computing do not compete for one interpreter."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Cores the model computes with; default: all but one, which is left to the server and its neighbours."""


class HttpBounds(_Strict):
    """What a client may send, and for how long, whoever serves it."""

    body_bytes: int = Field(default=1 << 20, ge=1024, le=1 << 30)
    header_bytes: int = Field(default=16 << 10, ge=1024, le=1 << 20)
    header_seconds: float = Field(default=10.0, gt=0, le=600)
    body_seconds: float = Field(default=30.0, gt=0, le=600)
    request_seconds: float = Field(default=600.0, gt=0, le=86_400)
    write_seconds: float = Field(default=30.0, gt=0, le=600)
    drain_seconds: float = Field(default=30.0, ge=0, le=3600)
    drain_delay: float = Field(default=0.0, ge=0, le=600)
    """Seconds after a signal in which requests are still taken, while `/ready` tells routers to look elsewhere."""
    connections: int = Field(default=1024, ge=2, le=65_536)
    connections_per_client: int | None = Field(default=None, ge=1, le=65_536)
    """Of one address; default: three quarters of all."""


class Bounds(HttpBounds):
    """What a client may ask of an engine, and for how long."""

    step_seconds: float = Field(default=300.0, gt=0, le=86_400)
    """Seconds without a turn of an engine in a process of its own, after which it is taken to hang and is killed."""
    queue_requests: int | None = Field(default=None, ge=1, le=65_536)
    """Requests that may wait; default 4 x engine.requests."""
    queue_tokens: int | None = Field(default=None, ge=1, le=1 << 28)
    """Prompt tokens that may wait; default: what can be prefilled in four times the shortest TTFT target; no bound if no class has one."""
    reserved: float = Field(default=0.25, ge=0, le=0.9)
    """Share of the queue that only the classes of the smallest priority may use."""
    n: int = Field(default=16, ge=1, le=16)
    sequences: int = Field(default=16, ge=1, le=256)
    """Of one request with a method of decoding: beams of `des`."""
    stop_strings: int = Field(default=64, ge=1, le=64)
    template_bytes: int = Field(default=64 << 10, ge=0, le=1 << 20)
    text_seconds: float = Field(default=2.0, gt=0, le=600)
    """Of a processor, for tokenizing the texts of one request, rendering its chat, or reading the form of its answer."""
    text_bytes: int = Field(default=512 << 20, ge=64 << 20, le=1 << 40)
    """Memory that such work may take."""
    grammar_bytes: int = Field(default=64 << 10, ge=0, le=1 << 20)
    """Of a form that an answer must have."""


class Config(_Strict):
    """Everything of `qos.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    classes: dict[str, RequestClass] = Field(default_factory=default_classes)
    default_class: str = "standard"
    policy: str = "elastic"
    policy_options: dict[str, Any] = Field(default_factory=dict)
    engine: EngineLimits = EngineLimits()
    bounds: Bounds = Bounds()
    names: dict[str, float] = Field(default_factory=dict)
    """Names for qualities: a request may then say `quality: good` instead of a number."""

    @property
    def queue_requests(self) -> int:
        return self.bounds.queue_requests or 4 * self.engine.requests


def load_config(path: Path | None) -> Config:
    """Read `qos.yaml`; the defaults for None. UsageError names the file, the key, and the nearest legal one."""
    if path is None:
        return Config()
    return read_config(read_yaml(path), str(path))


def read_config(data: object, where: str = "config") -> Config:
    """A Config from plain data."""
    if not isinstance(data, dict):
        raise UsageError(f"{where} is not a mapping", f"give it some of: {', '.join(Config.model_fields)}")
    fields = dict(data)
    if "classes" in fields:
        fields["classes"] = read_classes(fields["classes"], where)
        fields.setdefault("default_class", next(iter(fields["classes"])))
    try:
        config = Config(**fields)
    except (ValidationError, TypeError) as error:
        raise UsageError(f"{where}: {_first(error)}", "see docs/reference/serving.md") from error
    if config.default_class not in config.classes:
        raise UsageError(
            f"{where}: default_class '{config.default_class}' is no class", f"choose one of: {', '.join(config.classes)}"
        )
    return config


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        scopes: dict[str, type[BaseModel]] = {"engine": EngineLimits, "bounds": Bounds}
        scope = scopes.get(str(first["loc"][0]), Config) if len(first["loc"]) > 1 else Config
        near = difflib.get_close_matches(str(first["loc"][-1]), scope.model_fields, 1)
        return f"unknown key '{place}'" + (f", did you mean '{near[0]}'?" if near else "")
    return f"{place}: {first['msg'].lower()}"
