"""One piece of work on a client's text, and what comes of it. Plain data that msgspec carries."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]
"""Kinds of forms."""


class Encode(msgspec.Struct, tag=True):
    """Texts to token ids. most: bytes that one of them may have, 0 for any number."""

    texts: list[str]
    special: bool
    most: int


class RenderChat(msgspec.Struct, tag=True):
    """Messages to token ids, through the model's chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    open_turn: bool
    continues: bool
    special: bool
    most: int


class Compile(msgspec.Struct, tag=True):
    """A form that an answer must have, to what the engine can follow. vocabulary: ids that the model can draw; eos: its end tokens."""

    kind: Kind
    text: str
    vocabulary: int
    eos: list[int]


class Tokens(msgspec.Struct, tag=True):
    """Token ids, one list per text."""

    rows: list[list[int]]


class Compiled(msgspec.Struct, tag=True):
    """A grammar as xgrammar writes it."""

    text: str


class Unfit(msgspec.Struct, tag=True):
    """The request cannot be met: an error 400."""

    message: str
    param: str
    code: str | None = None


Job = Encode | RenderChat | Compile
Result = Tokens | Compiled | Unfit
