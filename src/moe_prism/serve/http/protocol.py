"""The OpenAI request bodies we accept, with a bound on both sides of every number."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

TokenId = Annotated[StrictInt, Field(ge=0, le=(1 << 31) - 1)]
Text = Annotated[str, Field(max_length=1 << 20)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
MAX_TOKENS = 1 << 20


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: StrictBool = False


class Common(BaseModel):
    """Fields of both endpoints. Fields we do not know are ignored and named in the header x-moe-prism-ignored."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, populate_by_name=True)

    model: str | None = Field(default=None, max_length=256)
    n: StrictInt = Field(default=1, ge=1, le=16)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: StrictInt | None = Field(default=None, ge=-(1 << 63), le=(1 << 63) - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=64)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    user: str | None = Field(default=None, max_length=256)
    ignore_eos: StrictBool = False  # as in vLLM: generate max_tokens tokens whatever they are
    # ours
    quality: Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(max_length=64)] | None = None
    min_quality: Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(max_length=64)] | None = None
    ttft_ms: float | None = Field(default=None, ge=1, le=3_600_000)
    tpot_ms: float | None = Field(default=None, ge=0.1, le=3_600_000)
    priority: StrictInt | None = Field(default=None, ge=-1000, le=1000)
    kind: str | None = Field(default=None, alias="class", max_length=64)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def unsupported(self) -> str | None:
        """The name of a field that asks for something we do not do."""
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                return name
        extra = self.model_extra or {}
        for name in ("suffix", "tools", "functions", "audio", "guided_json", "guided_regex", "prompt_embeds"):
            if extra.get(name):
                return name
        if extra.get("best_of") not in (None, 1, self.n):
            return "best_of"
        kind = extra.get("response_format")
        if kind is not None and not (isinstance(kind, dict) and kind.get("type") == "text"):
            return "response_format"
        return None

    def ignored(self) -> list[str]:
        """Unknown fields, as they may be shown in a header."""
        names = [name for name in (self.model_extra or {}) if name.isascii() and name.replace("_", "").isalnum()]
        return sorted(names)[:16]


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]
        | Annotated[list[Text], Field(min_length=1, max_length=64)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS)]], Field(min_length=1, max_length=64)
        ]
    )
    max_tokens: StrictInt | None = Field(default=16, ge=0, le=MAX_TOKENS)
    logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    echo: StrictBool | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class ContentPart(BaseModel):
    """A part of a message. Text only."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a chat."""

    role: str = Field(min_length=1, max_length=32)
    content: Text | Annotated[list[ContentPart], Field(max_length=64)] | None = None

    def plain(self) -> dict[str, str]:
        """For a chat template: data, nothing else."""
        parts = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        return {"role": self.role, "content": parts}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: StrictInt | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(default=None, ge=0, le=20)


class ErrorBody(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorBody


class Refusal(Exception):
    """A request that is answered with an error. retry: seconds for Retry-After."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    def body(self) -> dict[str, Any]:
        """The answer's JSON, in OpenAI's form."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        extra = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return {**extra, "retry-after": str(self.retry)} if self.retry is not None else extra
