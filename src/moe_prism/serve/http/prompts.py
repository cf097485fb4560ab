"""From what a request says to the tokens of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import PrismError
from ..text.desk import too_long
from ..text.jobs import Compile, Compiled, Encode, Job, RenderChat, Result, Tokens, Unfit
from ..text.workers import Workers
from .protocol import ChatRequest, Common, CompletionRequest
from .refusal import Refusal
from .service import Service


async def do(workers: Workers, job: Job) -> Result:
    """What comes of work on a text; Refusal if it cannot be done."""
    try:
        result = await workers.do(job)
    except PrismError as error:
        raise Refusal(503, error.cause, code="engine", retry=5) from error
    if isinstance(result, Unfit):
        raise Refusal(400, result.message, param=result.param, code=result.code)
    return result


async def completion_prompts(service: Service, workers: Workers, body: CompletionRequest) -> list[list[int]]:
    """Token ids of every prompt of a completion."""
    prompts = body.prompts()
    texts = [p for p in prompts if isinstance(p, str)]
    most = _most(service, body)
    if most and (long := max(map(len, texts), default=0)) > most:  # before a byte of it is sent anywhere
        told = too_long(long, "prompt")
        raise Refusal(400, told.message, param=told.param, code=told.code)
    found = await do(workers, Encode(texts, body.add_special_tokens, most)) if texts else Tokens([])
    assert isinstance(found, Tokens)
    rows = iter(found.rows)
    out = [next(rows) if isinstance(p, str) else p for p in prompts]
    check_ids(service, [i for row in out for i in row], "prompt")
    return [_cut(service, body, row or _begin(service)) for row in out]


async def chat_prompts(service: Service, workers: Workers, body: ChatRequest) -> list[list[int]]:
    """Token ids of a chat, as its template writes it."""
    if body.continue_final_message and body.add_generation_prompt:
        raise Refusal(400, "either the last message goes on or a new turn begins", param="add_generation_prompt")
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []] if body.tool_choice != "none" else []
    open_turn = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    job = RenderChat(
        messages=[message.plain() for message in body.messages],
        tools=tools or None,
        variables={**effort, **(body.chat_template_kwargs or {})},
        open_turn=open_turn,
        continues=body.continue_final_message,
        special=body.add_special_tokens,
        most=_most(service, body),
    )
    found = await do(workers, job)
    assert isinstance(found, Tokens)
    return [_cut(service, body, row or _begin(service)) for row in found.rows]


async def grammar(workers: Workers, form: Compile | None) -> str:
    """What the engine follows; "" for any text."""
    if form is None:
        return ""
    found = await do(workers, form)
    assert isinstance(found, Compiled)
    return found.text


def check_ids(service: Service, ids: Sequence[int], param: str) -> None:
    """Refusal for a token id that the model has not."""
    if ids and (max(ids) >= service.vocabulary or min(ids) < 0):
        raise Refusal(400, f"a token id is outside the vocabulary of {service.vocabulary}", param=param)


def _most(service: Service, body: Common) -> int:
    """Bytes that a prompt may have: no text that is longer can fit. 0 where the prompt is cut anyway."""
    return 0 if body.truncate_prompt_tokens is not None else service.most_bytes


def _cut(service: Service, body: Any, row: list[int]) -> list[int]:
    asked = body.truncate_prompt_tokens
    if asked is None:
        return row
    keep = max(1, service.context - (1 if body.most is None else max(1, body.most))) if asked == -1 else asked
    return row[-keep:] if keep else _begin(service)


def _begin(service: Service) -> list[int]:
    """An empty text continues from the beginning."""
    first = getattr(service.tokenizer, "bos_token_id", None)
    begin = [first] if isinstance(first, int) and 0 <= first < service.vocabulary else sorted(service.eos)[:1]
    if not begin:
        raise Refusal(400, "the prompt is empty, and the model has no token to begin with", param="prompt")
    return begin
