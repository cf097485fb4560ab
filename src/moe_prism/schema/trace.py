"""Recorded routing (`moe-prism trace`) and recorded requests (`moe-prism bench --trace`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from .common import Blocks, Experts, Form, Share

AGAIN = "record it again with `moe-prism trace`"
Tokens = Annotated[int, Field(ge=1, le=1 << 24)]


class TraceHeader(Form):
    """What the arrays of a trace are checked with; the recorder adds facts of its own, which nothing reads."""

    model_config = ConfigDict(extra="allow")

    format: Literal[1]
    experts: Experts
    k: Annotated[int, Field(ge=1, le=4096)]
    n_sub: Annotated[int, Field(ge=1, le=32)]
    layers: Blocks


class RequestLine(Form):
    """One line of a file of requests."""

    arrival: Annotated[float, Field(ge=0, lt=1e9)]
    class_: Annotated[str, Field(alias="class", min_length=1, max_length=256)]
    prompt: Tokens
    output: Tokens
    length: Tokens | None = None
    floor: Share | None = None
