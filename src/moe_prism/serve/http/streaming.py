"""An answer as server-sent events.

Not FastAPI's own: it encodes what a path operation yields, so the status is sent before the first event is known, and it is there from
0.135 on only. sse-starlette pings between events, which clients of OpenAI's API do not expect. An event of ours is one line.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from .answer import Answer
from .answers import event
from .client_stream import ClientStream
from .refusal import Refusal
from .service import Service
from .strands import Piece, Strand

logger = logging.getLogger("moe_prism.requests")


class Events(ClientStream):
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
    reason, options = "disconnect", answer.body.options
    try:
        if answer.chat:
            for strand in answer.strands:
                yield event(_chunk(answer, strand, Piece(), {"role": "assistant", "content": ""}))
        open_ = len(tasks)
        while open_:
            strand, piece = await merged.get()
            if isinstance(piece, Refusal):
                reason = "error"
                yield event(piece.body())
                return
            yield event(
                _chunk(answer, strand, piece, ({"content": piece.text} if piece.text else {}) if answer.chat else piece.text)
            )
            open_ -= piece.finish is not None
        if options.include_usage:
            last = {**answer.base(chunk=True), "choices": [], "moe_prism": answer.service.served(answer.strands)}
            yield event({**last, "usage": answer.usage})
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


def _chunk(answer: Answer, strand: Strand, piece: Piece, said: Any) -> dict[str, Any]:
    choice = {**answer.about(strand, piece), "delta" if answer.chat else "text": said}
    if "role" not in said and answer.body.return_token_ids and strand.generated > len(piece.tokens):
        choice.pop("prompt_token_ids", None)  # the first chunk had it
    chunk = {**answer.base(chunk=True), "choices": [choice]}
    if answer.body.options.continuous_usage_stats:
        chunk["usage"] = answer.usage
    if piece.finish:
        served = answer.service.served([strand])
        chunk["moe_prism"] = served
        chunk["system_fingerprint"] += f"-{served['point']}"
    return chunk
