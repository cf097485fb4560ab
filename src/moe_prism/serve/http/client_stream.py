"""A streamed answer that ends when its client leaves, whatever the server under it says of itself."""

from __future__ import annotations

from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from .guard import Message, Receive, Send

ASKED = "2.3"
"""From ASGI 2.4 on, a server fails a send to a client that has left, and Starlette waits for that alone: nobody notices who leaves while
nothing is sent. uvicorn said 2.4 for a while. Below 2.4 Starlette listens for the client."""


class ClientStream(StreamingResponse):
    """Ends quietly where the client has left, told by the server or by a send that fails."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            try:
                await send(message)
            except OSError:
                raise ClientDisconnect from None

        listening: Any = {**scope, "asgi": {**scope.get("asgi", {}), "spec_version": ASKED}}
        try:
            await super().__call__(listening, receive, sent)
        except* ClientDisconnect:  # alone or in the group of Starlette's tasks
            pass
