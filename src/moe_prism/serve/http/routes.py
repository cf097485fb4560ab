"""The two generating endpoints: completions and chat, from a checked body to an answer, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ..requests import PLAIN, Sampling
from ..text.jobs import Compile
from ..text.workers import Workers
from .admission import Door, Place
from .answer import Answer
from .decoding import check_decoding
from .prompts import chat_prompts, check_ids, completion_prompts, grammar
from .protocol import ChatRequest, Common, CompletionRequest
from .refusal import Refusal
from .service import Service
from .strands import Ends, Piece, Strand, StrandRequest, Wish
from .streaming import Events

LOOK = 0.05  # seconds between looks whether a waiting client is still there


@dataclass(frozen=True)
class House:
    """What a route needs."""

    service: Service
    door: Door
    workers: Workers


@dataclass(frozen=True)
class Understood:
    """What a body asks for, as far as it can be said without its tokens."""

    wish: Wish
    ends: Ends
    form: Compile | None


async def completions(house: House, http: Request, body: CompletionRequest) -> Response:
    """POST /v1/completions."""
    if body.best_of not in (None, body.n):
        raise Refusal(400, "best_of can only be n: nothing chooses among sequences", param="best_of", code="unsupported")
    return await _run(house, http, body, len(body.prompts()))


async def chat(house: House, http: Request, body: ChatRequest) -> Response:
    """POST /v1/chat/completions."""
    return await _run(house, http, body, 1)


async def _run(house: House, http: Request, body: Any, prompts: int) -> Response:
    service = house.service
    asked = _asked(service, body)
    place = house.door.enter(body.n * prompts, body.least_tokens(service.words.longest) * body.n, asked.wish.kind)
    try:
        answer = await _launch(house, body, asked, place, http.scope)
    except BaseException:
        place.leave()
        raise
    headers = _headers(service, body, asked.wish)
    if body.stream:
        return Events(answer, {**headers, "cache-control": "no-cache"})
    return await _whole(answer, http, headers)


def _asked(service: Service, body: Any) -> Understood:
    bounds = service.config.bounds
    if body.n > bounds.n:
        raise Refusal(400, f"n is above {bounds.n} (bounds.n)", param="n")
    if len(body.stops) > bounds.stop_strings:
        raise Refusal(400, f"more than {bounds.stop_strings} stop strings (bounds.stop_strings)", param="stop")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise Refusal(400, "max_tokens and max_completion_tokens differ", param="max_completion_tokens")
    if body.most is not None and body.min_tokens > body.most:
        raise Refusal(400, "min_tokens is above max_tokens", param="min_tokens")
    if body.top_logprobs_alone:
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.self_draft and not service.drafts:
        raise Refusal(400, "this server drafts nothing; start it with --self-draft", param="self_draft", code="unsupported")
    wish = service.wish(body)
    check_decoding(service, body, wish)
    check_ids(service, body.stop_token_ids or [], "stop_token_ids")
    check_ids(service, body.allowed_token_ids or [], "allowed_token_ids")
    check_ids(service, [token for token, _ in body.biases], "logit_bias")
    return Understood(wish, Ends.read(body, service.eos, service.words), service.form(body))


async def _launch(house: House, body: Any, asked: Understood, place: Place, scope: MutableMapping[str, Any]) -> Answer:
    """Tokens, then sequences in the engine. Gives nothing back where it fails, but what it has launched."""
    service, is_chat, salt = house.service, isinstance(body, ChatRequest), scope.get("moe_prism_salt", "")
    prompts = await (chat_prompts if is_chat else completion_prompts)(service, house.workers, body)
    compiled = await grammar(house.workers, asked.form)
    outputs = [service.output_tokens(len(p), body.most) for p in prompts]
    place.settle(sum(len(p) for p in prompts) * body.n, asked.wish.kind)
    name = ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex
    known, began = scope.get("moe_prism_passed_on", {}), service.engine.clock()
    answer = Answer(service, body, name, int(time.time()), prompts, asked.wish, place, [], began, known)
    try:
        for i in range(body.n * len(prompts)):
            prompt = i // body.n
            answer.strands.append(
                service.launch(
                    StrandRequest(
                        id=f"{name}-{i}",
                        index=i,
                        prompt=prompts[prompt],
                        sampling=_sampling(body, i % body.n, compiled, service.drafts),
                        wish=asked.wish,
                        output=outputs[prompt],
                        ends=asked.ends,
                        echo=bool(body.echo),
                        silent=body.most == 0,
                        hide_special=body.skip_special_tokens,
                        salt="\n".join(part for part in (salt, body.cache_salt) if part),
                    )
                )
            )
    except BaseException:
        answer.close("error")
        raise
    return answer


def _sampling(body: Any, i: int, compiled: str, drafts: bool) -> Sampling:
    counts = [body.prompt_logprobs, body.top if body.echo else None]
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=None if body.seed is None else (body.seed + i) % (1 << 63),
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        logprobs=body.top,
        prompt_logprobs=max((count for count in counts if count is not None), default=None),
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        bias=body.biases,
        allowed=tuple(body.allowed_token_ids or ()),
        min_tokens=body.min_tokens,
        grammar=compiled,
        self_draft=drafts and body.self_draft is not False,
        decode=body.decode or PLAIN,
        rewire=body.rewire,
    )


def _headers(service: Service, body: Common, wish: Wish) -> dict[str, str]:
    levels = service.ladder.levels
    low, high = levels[wish.floor].name, levels[wish.ceiling].name
    headers = {"x-moe-prism-class": wish.kind.name, "x-moe-prism-levels": low if low == high else f"{low}..{high}"}
    ignored = body.ignored()
    return {**headers, "x-moe-prism-ignored": ",".join(ignored)} if ignored else headers


async def _whole(answer: Answer, http: Request, headers: dict[str, str]) -> Response:
    tasks = [asyncio.create_task(_collect(answer.service, strand)) for strand in answer.strands]
    gathered = asyncio.gather(*tasks)
    reason = "error"
    try:
        while not gathered.done():
            await asyncio.wait([gathered], timeout=LOOK)
            if not gathered.done() and await http.is_disconnected():
                reason = "disconnect"
                answer.service.metrics.disconnects.inc()
                return Response(status_code=499)
        pieces: Sequence[Piece] = gathered.result()
        reason = pieces[0].finish or "stop"
        content = answer.whole(pieces)
        served = content["moe_prism"]
        point = {"x-moe-prism-point": str(served["point"]), "x-moe-prism-quality": str(served["quality"])}
        return JSONResponse(content, headers={**headers, **point})
    finally:
        gathered.cancel()
        for task in tasks:  # where one has failed, the others would wait for ever
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await gathered
        answer.close(reason)


async def _collect(service: Service, strand: Strand) -> Piece:
    """The whole sequence as one piece."""
    whole = Piece()
    async for piece in service.pieces(strand):
        whole = whole.and_then(piece)
    return whole
