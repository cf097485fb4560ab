"""The two generating endpoints: completions and chat, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..requests import Sampling, TokenLogprob
from .admission import Door, Place
from .answers import chat_logprobs, completion_logprobs, event, usage
from .protocol import ChatRequest, Common, CompletionRequest, Refusal
from .service import Piece, Service, Strand, StrandRequest, Wish

logger = logging.getLogger("moe_prism.requests")

LOOK = 0.05  # seconds between looks whether a waiting client is still there


@dataclass
class Answer:
    """One HTTP request on its way: what was asked, and its sequences."""

    service: Service
    body: Common
    id: str
    created: int
    chat: bool
    prompts: list[list[int]]
    texts: list[str]  # of the prompts, where `echo` wants them
    wish: Wish
    place: Place
    strands: list[Strand]
    began: float
    closed: bool = False

    @property
    def model(self) -> str:
        return self.service.name

    @property
    def kind(self) -> str:
        return "chat.completion" if self.chat else "text_completion"

    @property
    def top(self) -> int | None:
        """Alternatives to report per token; None: no log-probabilities."""
        return _top(self.body)

    def base(self, kind: str) -> dict[str, Any]:
        fingerprint = self.service.fingerprint
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": fingerprint}

    def close(self, reason: str) -> None:
        """Give everything back and write the log line; the text is in neither. Only the first call counts."""
        if self.closed:
            return
        self.closed = True
        for strand in self.strands:
            self.service.drop(strand)
        self.place.leave()
        self.service.metrics.finish(reason)
        served = self.service.served(self.strands)
        fields = {
            "id": self.id,
            "class": self.wish.kind.name,
            "end": reason,
            "prompt_tokens": sum(len(p) for p in self.prompts),
            "completion_tokens": sum(s.generated for s in self.strands),
            "point": served["point"],
            "quality": served["quality"],
            "seconds": round(self.service.engine.clock() - self.began, 4),
        }
        logger.info("request", extra={"fields": fields})


async def completions(service: Service, door: Door, http: Request, body: CompletionRequest) -> Response:
    """POST /v1/completions."""
    prompts = await service.encode(body.prompts())
    if body.echo and body.stream:
        raise Refusal(400, "echo cannot be streamed", param="echo")
    return await _run(service, door, http, body, prompts, chat=False)


async def chat(service: Service, door: Door, http: Request, body: ChatRequest) -> Response:
    """POST /v1/chat/completions."""
    template = getattr(service.tokenizer, "chat_template", None)
    if not template:
        raise Refusal(400, f"'{service.name}' has no chat template; use /v1/completions", code="no_chat_template")
    if not isinstance(template, str) or len(template.encode()) > service.config.bounds.template_bytes:
        raise Refusal(400, "the model's chat template is larger than the server allows", code="no_chat_template")
    messages = [m.plain() for m in body.messages]
    try:
        # transformers renders in a sandbox; roles it does not know make it raise
        text = await asyncio.to_thread(
            service.tokenizer.apply_chat_template, messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        raise Refusal(400, f"the chat template refused the messages: {type(error).__name__}", param="messages") from error
    rows = await asyncio.to_thread(lambda: service.tokenizer(text, add_special_tokens=False)["input_ids"])
    return await _run(service, door, http, body, [list(rows)], chat=True)


async def _run(service: Service, door: Door, http: Request, body: Any, prompts: list[list[int]], *, chat: bool) -> Response:
    _check(service, body)
    asked = (body.max_completion_tokens or body.max_tokens) if chat else body.max_tokens
    wish = service.wish(body)
    outputs = [service.output_tokens(len(p), asked) for p in prompts]
    count = body.n * len(prompts)
    texts = [service.tokenizer.decode(p) for p in prompts] if not chat and body.echo else [""] * len(prompts)
    place = door.enter(count, sum(len(p) for p in prompts) * body.n, wish.kind)
    answer = Answer(
        service,
        body,
        ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
        int(time.time()),
        chat,
        prompts,
        texts,
        wish,
        place,
        [],
        service.engine.clock(),
    )
    try:
        for i in range(count):
            prompt = i // body.n
            answer.strands.append(
                service.launch(
                    StrandRequest(
                        id=f"{answer.id}-{i}",
                        index=i,
                        prompt=prompts[prompt],
                        sampling=_sampling(body, i % body.n),
                        wish=wish,
                        output=outputs[prompt],
                        stops=body.stops,
                        hidden=asked == 0,
                        ignore_eos=body.ignore_eos,
                    )
                )
            )
    except BaseException:
        answer.close("error")
        raise
    headers = _headers(service, body, wish)
    if body.stream:
        return _Events(answer, {**headers, "cache-control": "no-cache"})
    return await _whole(answer, http, headers)


def _check(service: Service, body: Common) -> None:
    name = body.unsupported()
    if name is not None:
        raise Refusal(400, f"'{name}' is not supported", param=name, code="unsupported")
    bounds = service.config.bounds
    if body.n > bounds.n:
        raise Refusal(400, f"n is above {bounds.n}", param="n")
    if len(body.stops) > bounds.stop_strings:
        raise Refusal(400, f"more than {bounds.stop_strings} stop strings", param="stop")


def _sampling(body: Any, i: int) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    seed = None if body.seed is None else (body.seed + i) % (1 << 63)
    echo = bool(getattr(body, "echo", None))
    top = _top(body)
    return Sampling(temperature, 1.0 if body.top_p is None else body.top_p, seed, top, echo and top is not None)


def _top(body: Any) -> int | None:
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs  # type: ignore[no-any-return]


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
        results = gathered.result()
        reason = results[0][0].finish or "stop"
        served = answer.service.served(answer.strands)
        content = {
            **answer.base(answer.kind),
            "choices": [_choice(answer, s, *result) for s, result in zip(answer.strands, results, strict=True)],
            "usage": usage(answer.strands, sum(len(p) for p in answer.prompts)),
            "moe_prism": served,
        }
        content["system_fingerprint"] += f"-{served['point']}"
        point = {"x-moe-prism-point": str(served["point"]), "x-moe-prism-quality": str(served["quality"])}
        return JSONResponse(content, headers={**headers, **point})
    finally:
        gathered.cancel()
        for task in tasks:  # where one has failed, the others would wait for ever
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await gathered
        answer.close(reason)


async def _collect(service: Service, strand: Strand) -> tuple[Piece, list[TokenLogprob]]:
    """The whole sequence as one piece, and the log-probabilities of its prompt."""
    pieces = [piece async for piece in service.pieces(strand)]
    logprobs = tuple(entry for piece in pieces for entry in piece.logprobs)
    whole = Piece("".join(piece.text for piece in pieces), logprobs, finish=pieces[-1].finish)
    return whole, [entry for piece in pieces for entry in piece.prompt]


def _choice(answer: Answer, strand: Strand, piece: Piece, prompt: Sequence[TokenLogprob]) -> dict[str, Any]:
    tokenizer, top = answer.service.tokenizer, answer.top
    choice: dict[str, Any] = {"index": strand.index, "finish_reason": piece.finish, "logprobs": None}
    if answer.chat:
        if top is not None:
            choice["logprobs"] = chat_logprobs(tokenizer, piece.logprobs, top)
        return {**choice, "message": {"role": "assistant", "content": piece.text, "refusal": None}}
    if top is not None:
        choice["logprobs"] = completion_logprobs(tokenizer, [*prompt, *piece.logprobs], 0, top)
    return {**choice, "text": answer.texts[strand.index // answer.body.n] + piece.text}


class _Events(StreamingResponse):
    """Gives everything back whichever way the response ends, before its first event too. A generator that is left alone is closed by the
    garbage collector, at a time of its own.
    """

    def __init__(self, answer: Answer, headers: dict[str, str]) -> None:
        self._answer, self._events = answer, _stream(answer)
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            self._answer.close("disconnect")


async def _stream(answer: Answer) -> AsyncGenerator[bytes, None]:
    """Events of all sequences as they come, then usage if asked for, then [DONE]."""
    merged: asyncio.Queue[tuple[Strand, Piece | Refusal]] = asyncio.Queue()
    tasks = [asyncio.create_task(_feed(answer.service, strand, merged)) for strand in answer.strands]
    reason, offsets = "disconnect", [0] * len(tasks)
    try:
        if answer.chat:
            for strand in answer.strands:
                yield event(_chunk(answer, strand, {"role": "assistant", "content": ""}, None, None))
        open_ = len(tasks)
        while open_:
            strand, piece = await merged.get()
            if isinstance(piece, Refusal):
                reason = "error"
                yield event(piece.body())
                return
            yield event(_piece_chunk(answer, strand, piece, offsets))
            offsets[strand.index] += len(piece.text)
            open_ -= piece.finish is not None
        last = {**answer.base(_chunk_kind(answer)), "choices": [], "moe_prism": answer.service.served(answer.strands)}
        if answer.body.usage_in_stream:
            yield event({**last, "usage": usage(answer.strands, sum(len(p) for p in answer.prompts))})
        yield event("[DONE]")
        reason = "stop"
    finally:
        if reason == "disconnect":
            answer.service.metrics.disconnects.inc()
        for task in tasks:
            task.cancel()
        answer.close(reason)


async def _feed(service: Service, strand: Strand, merged: asyncio.Queue[tuple[Strand, Piece | Refusal]]) -> None:
    try:
        async for piece in service.pieces(strand):
            merged.put_nowait((strand, piece))
    except Refusal as refusal:
        merged.put_nowait((strand, refusal))
    except Exception:
        logger.exception("an answer failed")  # and whoever waits for its next piece must hear of it
        merged.put_nowait((strand, Refusal(500, "an error inside the server")))


def _chunk_kind(answer: Answer) -> str:
    return "chat.completion.chunk" if answer.chat else "text_completion"


def _piece_chunk(answer: Answer, strand: Strand, piece: Piece, offsets: list[int]) -> dict[str, Any]:
    tokenizer, top = answer.service.tokenizer, answer.top
    logprobs = None
    if top is not None and piece.logprobs:
        logprobs = (
            chat_logprobs(tokenizer, piece.logprobs, top)
            if answer.chat
            else completion_logprobs(tokenizer, piece.logprobs, offsets[strand.index], top)
        )
    delta = ({"content": piece.text} if piece.text else {}) if answer.chat else piece.text
    chunk = _chunk(answer, strand, delta, logprobs, piece.finish)
    if piece.finish:
        served = answer.service.served([strand])
        chunk["moe_prism"] = served
        chunk["system_fingerprint"] += f"-{served['point']}"
    return chunk


def _chunk(answer: Answer, strand: Strand, delta: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
    choice = {"index": strand.index, "delta" if answer.chat else "text": delta, "logprobs": logprobs, "finish_reason": finish}
    return {**answer.base(_chunk_kind(answer)), "choices": [choice]}
