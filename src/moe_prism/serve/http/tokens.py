"""Text to tokens and back, without the engine: /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictStr

from .detokenize import detokenizer
from .prompts import chat_prompts, check_ids, completion_prompts
from .protocol import ChatRequest, CompletionRequest
from .refusal import Refusal
from .routes import House
from .values import MAX_TOKENS, Closed, Json, Text, TokenId


class TokenizeRequest(Closed):
    """POST /tokenize: a text, or a chat with what its template takes."""

    model: StrictStr | None = Field(default=None, max_length=256)
    prompt: Text | None = None
    messages: list[Json] | None = Field(default=None, max_length=1024)
    tools: list[Json] | None = Field(default=None, max_length=128)
    chat_template_kwargs: Json | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    add_special_tokens: StrictBool | None = None
    return_token_strs: StrictBool = False


class DetokenizeRequest(Closed):
    """POST /detokenize."""

    model: StrictStr | None = Field(default=None, max_length=256)
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_TOKENS)]


async def tokenize(house: House, body: TokenizeRequest) -> dict[str, Any]:
    """Tokens of a prompt as a completion or a chat would have them. It takes a place like one: it costs the same work."""
    service = house.service
    said = body.model_dump(exclude_none=True, exclude={"return_token_strs", "model"})
    if ("prompt" in said) == ("messages" in said):
        raise Refusal(400, "give a prompt or messages", param="prompt")
    made = (ChatRequest if "messages" in said else CompletionRequest).model_validate({**said, "truncate_prompt_tokens": None})
    place = house.door.enter(1, 0, service.config.classes[service.config.default_class])
    try:
        if isinstance(made, ChatRequest):
            (tokens,) = await chat_prompts(service, house.workers, made)
        else:
            assert isinstance(made, CompletionRequest)
            (tokens,) = await completion_prompts(service, house.workers, made)
    finally:
        place.leave()
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": service.context, "tokens": tokens}
    return {**answer, "token_strs": [service.words.piece(t).name for t in tokens]} if body.return_token_strs else answer


def detokenize(house: House, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of tokens, special ones by name."""
    check_ids(house.service, body.tokens, "tokens")
    text = detokenizer(house.service.words, (), hide=False)
    return {"prompt": "".join(text.push(token).text for token in body.tokens) + text.rest()}
