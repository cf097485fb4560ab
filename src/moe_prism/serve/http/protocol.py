"""The OpenAI request bodies that we accept: what each field does, its check, its default, an example. `fields` has what is not done."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidatorFunctionWrapHandler,
    model_validator,
)

from ..text.jobs import Kind
from .fields import Endpoint, sort_out
from .refusal import Refusal
from .values import (
    MAX_TOKENS,
    Biases,
    Content,
    Json,
    Name,
    Number,
    Prompt,
    Quality,
    ResponseFormat,
    Stop,
    StreamOptions,
    StructuredOutputs,
    TokenId,
    TokenIds,
    Tool,
    ToolCall,
    TpotMs,
    TtftMs,
    without_nulls,
)


def takes(meaning: str, example: Any, default: Any = None, **bounds: Any) -> Any:
    """A field of a request."""
    return Field(default=default, description=meaning, examples=[example], **bounds)


class Common(BaseModel):
    """Fields of both endpoints."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    endpoint: ClassVar[Endpoint]
    _ignored: list[str] = PrivateAttr(default_factory=list)

    model: StrictStr | None = takes("its name, or NAME@QUALITY", None, max_length=256)
    n: StrictInt = takes("sequences per prompt", 2, 1, ge=1, le=16)
    temperature: Number | None = takes("0 takes the likeliest token; default 1", 0.5, ge=0, le=2)
    top_p: Number | None = takes("draw among the likeliest tokens that have this share together", 0.9, gt=0, le=1)
    top_k: StrictInt | None = takes("draw among the k likeliest tokens; 0 and -1: all", 5, ge=-1, le=MAX_TOKENS)
    min_p: Number | None = takes("draw among tokens with at least this share of the likeliest one's probability", 0.1, ge=0, le=1)
    seed: StrictInt | None = takes("the same seed draws the same tokens", 7, ge=-(1 << 63), le=(1 << 63) - 1)
    presence_penalty: Number | None = takes("taken off the logits of tokens that were generated", 0.5, ge=-2, le=2)
    frequency_penalty: Number | None = takes("taken off once for every time that a token was generated", 0.5, ge=-2, le=2)
    repetition_penalty: Number | None = takes("divides the logits of tokens of prompt and answer", 1.2, gt=0, le=10)
    logit_bias: Biases | None = takes("token id -> added to its logit, -100 to 100", {"5": -100}, max_length=1024)
    allowed_token_ids: TokenIds | None = takes("no other tokens are drawn", [5, 6])
    stop: Stop | None = takes("the answer ends before the first of these; a special token's name matches by its id", ["\n\n"])
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=1024)] | None = takes(
        "these tokens end the answer too", [5]
    )
    include_stop_str_in_output: StrictBool = takes("the text ends with what stopped it", True, False)
    ignore_eos: StrictBool = takes("the model's end tokens do not end the answer", True, False)
    min_tokens: StrictInt = takes("nothing but the length ends the answer before", 2, 0, ge=0, le=MAX_TOKENS)
    skip_special_tokens: StrictBool = takes("special tokens do not show in the text", False, True)
    truncate_prompt_tokens: StrictInt | None = takes("keep the last so many tokens; -1: as many as fit", 3, ge=-1, le=MAX_TOKENS)
    prompt_logprobs: StrictInt | None = takes("alternatives to report for every token of the prompt", 1, ge=0, le=20)
    response_format: ResponseFormat | None = takes("text, a JSON object, or JSON of a schema", {"type": "json_object"})
    structured_outputs: StructuredOutputs | None = takes(
        "the form of the answer: one of json, json_object, regex, choice, grammar", {"choice": ["yes", "no"]}
    )
    return_token_ids: StrictBool = takes("the answer has token ids too", True, False)
    cache_salt: Name | None = takes("prefixes are shared only among requests with the same salt", "mine")
    stream: StrictBool = takes("send the answer as it grows", True, False)
    stream_options: StreamOptions | None = takes("include_usage, continuous_usage_stats", {"include_usage": True})
    quality: Quality | None = takes("a quality or an operating point, whatever the load", 0.9)
    min_quality: Quality | None = takes("load may lower the quality to this", 0.8)
    ttft_ms: TtftMs | None = takes("target: milliseconds to the first token", 500)
    tpot_ms: TpotMs | None = takes("target: milliseconds per further token", 50)
    priority: StrictInt | None = takes("smaller first", 1, ge=-1000, le=1000)
    self_draft: StrictBool | None = takes(
        "false: draft nothing; true: only where the server drafts (`--self-draft`); no token changes by it", False
    )
    decode: Annotated[StrictStr, Field(min_length=1, max_length=512)] | None = takes(
        "how tokens follow from forwards, as `generate --decode` has it: `scmoe:0.5`; only methods of `--decoding`", "plain"
    )
    rewire: StrictInt = takes(
        "steps that fit the router to the prompt before it is answered; only with `--decoding rewiring`", 0, 0, ge=0, le=64
    )
    kind: StrictStr | None = takes("request class, which has the defaults of the others", "batch", alias="class", max_length=64)

    @model_validator(mode="wrap")
    @classmethod
    def _sorted_out(cls, data: Any, handler: ValidatorFunctionWrapHandler) -> Self:
        if not isinstance(data, dict):
            return handler(data)  # type: ignore[no-any-return]  # it says that this is no object
        kept, ignored = sort_out(data, cls.names(), cls.endpoint)
        made: Self = handler(kept)
        made._ignored = ignored
        return made

    @classmethod
    def names(cls) -> list[str]:
        """The fields that are done, as a client writes them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """(token id, what is added to its logit). ValueError if a key is no token id."""
        return tuple((int(token) if token.isdecimal() else -1, bias) for token, bias in (self.logit_bias or {}).items())

    @property
    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()

    def form(self) -> tuple[Kind, str] | None:
        """Kind and text of the form that the answer must have (`text.jobs.Compile`); None for any text. Refusal for two of them."""
        asked, wanted = self.structured_outputs, self.response_format
        if asked is None:
            return _form_of(wanted)
        if _form_of(wanted):
            raise Refusal(400, "response_format and structured_outputs both ask for a form", param="response_format")
        given = {name: value for name, value in asked.model_dump(by_alias=True).items() if value is not None}
        if len(given) != 1:
            raise Refusal(400, "give one of json, json_object, regex, choice, grammar", param="structured_outputs")
        ((name, value),) = given.items()
        kind = cast(Kind, name)
        return kind, "" if kind == "json_object" else value if isinstance(value, str) else json.dumps(value)

    def ignored(self) -> list[str]:
        """Fields without effect that were given."""
        return self._ignored


def _form_of(wanted: ResponseFormat | None) -> tuple[Kind, str] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return "json_object", ""
    if wanted.json_schema is None:
        raise Refusal(400, "json_schema is left out", param="response_format.json_schema")
    return "json", json.dumps(wanted.json_schema.schema_)


class CompletionRequest(Common):
    """POST /v1/completions."""

    endpoint = "completions"

    prompt: Prompt = Field(description="a text, token ids, or a list of up to 64 of either", examples=["import os"])
    max_tokens: StrictInt | None = takes("tokens at most; default 16", 4, ge=0, le=MAX_TOKENS)
    max_completion_tokens: StrictInt | None = takes("the same", 4, ge=0, le=MAX_TOKENS)
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | Literal[False] | None = takes(
        "alternatives to report for every token", 2
    )
    echo: StrictBool = takes("the answer begins with the prompt", True, False)
    best_of: StrictInt | None = takes("only as many as n", 1, ge=1, le=16)
    add_special_tokens: StrictBool = takes("the tokenizer adds what it adds to a text", False, True)

    @property
    def most(self) -> int | None:
        """Tokens at most."""
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return 16 if asked is None else asked

    @property
    def top(self) -> int | None:
        """Alternatives to report per token; None: no log-probabilities."""
        return None if self.logprobs is None or self.logprobs is False else self.logprobs

    top_logprobs_alone: ClassVar[bool] = False

    def least_tokens(self, longest: int) -> int:
        """Tokens that its prompts have at least, before anybody counts them. longest: bytes of the longest token."""
        return sum(len(p) if isinstance(p, list) else -(-len(p) // longest) for p in self.prompts())

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Message(BaseModel):
    """A message of a chat. Keys beside these go to the chat template as they are, where it knows them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    role: StrictStr = Field(min_length=1, max_length=32)
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Annotated[StrictStr, Field(max_length=256)] | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _left_out(cls, data: Any, handler: ValidatorFunctionWrapHandler) -> Self:
        made: Self = handler(without_nulls(data))
        if made.content is None and not made.tool_calls:
            raise ValueError("content is left out")
        return made

    def ignored(self) -> list[str]:
        """Keys that say nothing of the message: clients repeat them from answers."""
        found = {**(self.model_extra or {})}
        empty = [key for key in ("annotations", "tool_calls") if found.get(key) == []]
        return [
            *empty,
            *(key for key in ("id", "status") if key in found),
            *["type"] * (found.get("type") in ("message", "text")),
        ]

    def plain(self) -> Json:
        """For a chat template: data, nothing else."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        left_out = self.ignored()
        extra = {key: value for key, value in (self.model_extra or {}).items() if key not in left_out}
        out: Json = {"role": self.role, "content": text, **extra}
        if self.tool_calls:
            out["tool_calls"] = [call.plain() for call in self.tool_calls]
        return {**out, **{k: v for k in ("name", "tool_call_id") if (v := getattr(self, k)) is not None}}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    endpoint = "chat"

    messages: list[Message] = Field(
        min_length=1,
        max_length=1024,
        description="the conversation; tool calls and further keys as the chat template takes them",
        examples=[[{"role": "user", "content": "hi"}]],
    )
    max_tokens: StrictInt | None = takes("tokens at most; default: what fits", 4, ge=1, le=MAX_TOKENS)
    max_completion_tokens: StrictInt | None = takes("the same", 4, ge=1, le=MAX_TOKENS)
    logprobs: StrictBool = takes("report log-probabilities", True, False)
    top_logprobs: StrictInt | None = takes("alternatives to report for every token", 2, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = takes(
        "given to the chat template; a call comes back as text",
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    )
    tool_choice: Literal["none", "auto"] | None = takes("none keeps the tools from the template", "auto")
    parallel_tool_calls: Literal[True] | None = takes("the model decides", True)
    add_generation_prompt: StrictBool | None = takes("the template opens the assistant's turn; default true", True)
    continue_final_message: StrictBool = takes(
        "the answer continues the last message; not with add_generation_prompt", True, False
    )
    add_special_tokens: StrictBool = takes("the tokenizer adds what it adds to a text", True, False)
    chat_template_kwargs: dict[str, StrictBool | StrictInt | float | Annotated[StrictStr, Field(max_length=1024)]] | None = takes(
        "variables of the chat template; others are refused", {"enable_thinking": False}, max_length=16
    )
    reasoning_effort: Annotated[StrictStr, Field(max_length=64)] | None = takes("a variable of the chat template", "low")
    echo: Literal[False] | None = takes("chats are not echoed", False)

    @property
    def most(self) -> int | None:
        """Tokens at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """Alternatives to report per token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def top_logprobs_alone(self) -> bool:
        """Alternatives of what is not reported."""
        return bool(self.top_logprobs) and not self.logprobs

    def least_tokens(self, longest: int) -> int:
        """Tokens that its prompt has at least: one per message, since a template may leave text out."""
        return len(self.messages)

    def ignored(self) -> list[str]:
        """Fields without effect that were given, keys of messages among them."""
        return sorted({*self._ignored, *(f"messages.{key}" for message in self.messages for key in message.ignored())})


REQUESTS: dict[Endpoint, type[Common]] = {"completions": CompletionRequest, "chat": ChatRequest}
