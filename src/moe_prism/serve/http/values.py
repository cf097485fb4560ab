"""The kinds of values that request fields take, each with a bound on both sides, and unions that look at the value's own type first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    field_validator,
    model_validator,
)

MAX_TOKENS = 1 << 20
MAX_PROMPTS = 64

TokenId = Annotated[StrictInt, Field(ge=0, le=(1 << 31) - 1)]
Text = Annotated[StrictStr, Field(max_length=1 << 20)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=256)]
Number = Annotated[float, Strict()]
MAX_MS = 3_600_000
"""An hour: a target beyond it is no target."""
TtftMs = Annotated[Number, Field(ge=1, le=MAX_MS)]
TpotMs = Annotated[Number, Field(ge=0.1, le=MAX_MS)]
Json = dict[str, Any]
"""Data that we hand on as it is; its size is bounded by the body's."""


def without_nulls(data: object) -> object:
    """A mapping without the keys whose value is null: null means left out, everywhere."""
    return {key: value for key, value in data.items() if value is not None} if isinstance(data, Mapping) else data


Biases = Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], BeforeValidator(without_nulls)]


class Closed(BaseModel):
    """An object with these keys and no others; null is left out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, data: object) -> object:
        return without_nulls(data)


def one_of(choices: str, *tagged: Any, by: Any) -> Any:
    """A union whose member `by` chooses from the value, so that errors are of the member that was meant. choices: told when none is."""
    union: Any = tagged[0]
    for member in tagged[1:]:
        union = union | member
    told = Discriminator(by, custom_error_type="type", custom_error_message=f"give {choices}")
    return Annotated[union, told]


def _first_of(value: object) -> object:
    return value[0] if isinstance(value, list) and value else None


def _kind_of_prompt(value: object) -> str | None:
    if isinstance(value, str):
        return "a text"
    first = _first_of(value)
    kinds = {int: "list of token ids", str: "list of texts", list: "list of lists"}
    return kinds.get(type(first))


def _kind_of_stop(value: object) -> str | None:
    return "a text" if isinstance(value, str) else "list of texts" if isinstance(value, list) else None


def _kind_of_quality(value: object) -> str | None:
    if isinstance(value, bool):
        return None
    return "a number" if isinstance(value, int | float) else "a name" if isinstance(value, str) else None


TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_TOKENS)]
StopString = Annotated[StrictStr, Field(min_length=1, max_length=256)]

Prompt = one_of(
    f"a text, a list of token ids, or a list of up to {MAX_PROMPTS} of either, none of them empty lists",
    Annotated[Text, Tag("a text")],
    Annotated[TokenIds, Tag("list of token ids")],
    Annotated[list[Text], Field(fail_fast=True, max_length=MAX_PROMPTS), Tag("list of texts")],
    Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS), Tag("list of lists")],
    by=_kind_of_prompt,
)
Stop = one_of(
    "a text or a list of texts",
    Annotated[StopString, Tag("a text")],
    Annotated[list[StopString], Field(fail_fast=True, max_length=64), Tag("list of texts")],
    by=_kind_of_stop,
)
Quality = one_of(
    "a number from 0 to 1 or the name of an operating point",
    Annotated[float, Field(ge=0, le=1), Tag("a number")],
    Annotated[StrictStr, Field(max_length=64), Tag("a name")],
    by=_kind_of_quality,
)


class StreamOptions(Closed):
    """What a stream says beside the text."""

    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False
    include_obfuscation: StrictBool = False  # padding against observers of the wire; there is none here, which changes no answer


class TextPart(Closed):
    """A part of a message that is text."""

    KINDS: ClassVar = ("text", "input_text", "output_text")
    type: Literal["text", "input_text", "output_text"]
    text: Text


def _text_part(value: object) -> object:
    if isinstance(value, dict) and value.get("type") not in TextPart.KINDS:
        raise ValueError('this model reads nothing but text: give {"type": "text", "text": ...}')
    return value


def _kind_of_content(value: object) -> str | None:
    return "a text" if isinstance(value, str) else "list of parts" if isinstance(value, list) else None


Part = Annotated[TextPart, BeforeValidator(_text_part)]
Content = one_of(
    "a text or a list of text parts",
    Annotated[Text, Tag("a text")],
    Annotated[list[Part], Field(fail_fast=True, max_length=256), Tag("list of parts")],
    by=_kind_of_content,
)


class CalledFunction(Closed):
    """The function that a call of an assistant named. arguments: JSON as text, or the object itself."""

    name: Name
    arguments: Json = Field(default_factory=dict)

    @field_validator("arguments", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        try:
            return json.loads(value or "{}") if isinstance(value, str) else value
        except (ValueError, RecursionError):
            raise ValueError("give the arguments as JSON") from None


class ToolCall(Closed):
    """One call of an assistant's message."""

    id: Annotated[StrictStr, Field(max_length=256)] | None = None
    index: StrictInt | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self) -> Json:
        """As chat templates read it: the arguments are an object."""
        return {**self.model_dump(exclude_none=True, exclude={"index"}), "type": "function"}


class Function(Closed):
    """A function that a model may call. parameters: its JSON schema."""

    name: Name
    description: Annotated[StrictStr, Field(max_length=65_536)] | None = None
    parameters: Json | None = None
    strict: StrictBool | None = None


class Tool(Closed):
    """A tool, which is a function."""

    type: Literal["function"]
    function: Function


class JsonSchema(Closed):
    """What `response_format` says of an answer's form."""

    name: Annotated[StrictStr, Field(max_length=256)] | None = None
    description: Annotated[StrictStr, Field(max_length=65_536)] | None = None
    schema_: Json | StrictBool = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Closed):
    """OpenAI's way to ask for a form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def _kind_of_schema(value: object) -> str | None:
    return "a text" if isinstance(value, str) else "an object" if isinstance(value, dict) else None


Schema = one_of(
    "a JSON schema, as an object or as a text",
    Annotated[Json, Tag("an object")],
    Annotated[StrictStr, Field(max_length=1 << 16), Tag("a text")],
    by=_kind_of_schema,
)


class StructuredOutputs(Closed):
    """vLLM's way to ask for a form: one of these."""

    json_: Schema | None = Field(default=None, alias="json")  # type: ignore[valid-type]
    regex: Annotated[StrictStr, Field(min_length=1, max_length=4096)] | None = None
    choice: Annotated[list[Name], Field(min_length=1, max_length=1024)] | None = None
    grammar: Annotated[StrictStr, Field(min_length=1, max_length=1 << 16)] | None = None
    json_object: Literal[True] | None = None
