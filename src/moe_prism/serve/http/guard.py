"""What stands before every route: the key, the size and the pace of a body, the pace of a reader. Plain ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from ..config import HttpBounds
from .passed_on import passed_on
from .refusal import Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LARGE = 128 << 10
"""Bytes of a body that is large. Large ones come in one at a time: reading JSON of a megabyte keeps the event loop for milliseconds, and
fifty of them at once would keep it from everybody else.
"""
PAUSE = 0.1
"""Seconds between two large bodies, for everybody else."""

OPEN = frozenset({"/", "/health", "/ready", "/status"})
"""The paths that need no key: what probes ask, which carry none, and a page that asks for the key before it shows anything."""


class Keys:
    """Those that may come in. Hashes have one length and compare in constant time, and all of them are compared."""

    def __init__(self, keys: Sequence[str], *, salted: bool = False) -> None:
        """salted: every key has a prefix cache of its own."""
        self._hashes, self._salted = [hashlib.sha256(key.encode()).digest() for key in keys], salted

    def check(self, headers: Sequence[bytes]) -> str:
        """The salt of whoever shows these Authorization headers. Refusal for a wrong one, none, or several."""
        if not self._hashes:
            return ""
        if len(headers) > 1:  # what stands before this server may have looked at another one
            raise Refusal(400, "more than one Authorization header: send one", code="invalid_request")
        scheme, _, given = (headers[0] if headers else b"").partition(b" ")
        shown = hashlib.sha256(given).digest()
        matches = [hmac.compare_digest(shown, known) for known in self._hashes]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Refusal(401, "a valid API key is needed: Authorization: Bearer KEY", code="unauthorized")
        return shown.hex() if self._salted else ""


ADMIN = "/admin"
"""What lies below it asks for an administrator's key."""


class Guard:
    """Wraps the application; `refused(reason)` is told of every refusal."""

    def __init__(
        self, app: App, bounds: HttpBounds, keys: Keys, refused: Callable[[str], None], administrators: Keys | None = None
    ) -> None:
        """administrators: None: nothing is administered."""
        self.app, self.bounds, self.keys, self.refused = app, bounds, keys, refused
        self.administrators = administrators
        self.active: set[asyncio.Task[Any]] = set()
        self._turns = asyncio.Semaphore(1)
        self._closing = False

    async def end_all(self, seconds: float) -> None:
        """Whoever has no answer yet gets an error; returns when all have one, or after the time."""
        self._closing = True
        until = asyncio.get_running_loop().time() + seconds
        for task in list(self.active):
            task.cancel()
        while self.active and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110 - tasks that end by themselves tell nobody
            await asyncio.sleep(0.01)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        known = scope["moe_prism_passed_on"] = passed_on(scope["headers"])
        reply = _Reply(send, self.bounds.write_seconds, known.get("request_id"))
        task = asyncio.current_task()
        assert task is not None
        self.active.add(task)
        try:
            await self._through(scope, receive, reply)
        except Refusal as refusal:
            self.refused(refusal.code)
            await reply.refuse(refusal)
        except asyncio.CancelledError:
            if not self._closing:
                raise
            await reply.refuse(Refusal(503, "the server is shutting down", code="draining", retry=5))
        except Exception:
            if not reply.stalled:
                await reply.refuse(Refusal(500, "an error inside the server"))
                raise
        finally:
            self.active.discard(task)
        if reply.stalled:
            self.refused("slow_reader")
        elif reply.body is not None and reply.body.failure is not None:
            self.refused(reply.body.failure.code)

    async def _through(self, scope: Message, receive: Receive, reply: _Reply) -> None:
        """Every check that needs no body, then the application."""
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            said = "both Content-Length and Transfer-Encoding: send one of them"
            refusal = Refusal(400, said, code="invalid_request")
            refusal.close = True
            raise refusal
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > self.bounds.header_bytes:
            raise Refusal(
                431, f"the headers are larger than {self.bounds.header_bytes} bytes (bounds.header_bytes)", code="too_large"
            )
        is_open = (scope["path"].rstrip("/") or "/") in OPEN or _asks_first(scope["method"], headers)
        try:
            shown = [value for name, value in scope["headers"] if name == b"authorization"]
            is_admin = self.administrators is not None and f"{scope['path']}/".startswith(f"{ADMIN}/")
            keys = self.administrators if is_admin and self.administrators is not None else self.keys
            scope["moe_prism_salt"], scope["moe_prism_known"], scope["moe_prism_admin"] = keys.check(shown), True, is_admin
        except Refusal:
            if not is_open:
                raise
            scope["moe_prism_known"] = False
        body = reply.body = _Body(receive, self.bounds, headers.get(b"content-length"), self._turns)
        try:
            await self.app(scope, body.receive, reply.send)
        finally:
            body.let_go()


def _asks_first(method: str, headers: dict[bytes, bytes]) -> bool:
    """A browser asks whether a page may send, before the page sends its key. The answer holds no data."""
    return method == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers


class _Reply:
    """Times the client's reading. Frameworks turn any error while reading a body into one of theirs; ours goes out instead."""

    def __init__(self, send: Send, seconds: float, request_id: str | None) -> None:
        self._plain, self._seconds, self._request_id = send, seconds, request_id
        self.started = self.replaced = self.stalled = False
        self.body: _Body | None = None

    async def _send(self, message: Message) -> None:
        """The client finds its own name for the request in the answer, and after an error of ours that the server closes the connection."""
        if message["type"] == "http.response.start":
            own = [(b"x-request-id", self._request_id.encode())] if self._request_id else []
            own += [(b"connection", b"close")] if message["status"] == 500 else []
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await self._plain(message)

    async def send(self, message: Message) -> None:
        if not self.started and self.body is not None and self.body.failure is not None:
            await self.refuse(self.body.failure)
        if self.replaced:
            return
        self.started = True
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            self.stalled = True
            self.drop()
            raise ConnectionAbortedError from None  # what frameworks take for a client that left

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with an error, if nothing has been answered yet; what the application says after that is dropped."""
        if not self.started:
            self.started = self.replaced = True
            await answer(refusal, self._send)

    def drop(self) -> None:
        """Close the connection without waiting for the client. The server's `send` is a method of its request cycle."""
        transport = getattr(getattr(self._plain, "__self__", None), "transport", None)
        if transport is not None:
            transport.abort()


class _Body:
    """Counts and times what a client sends."""

    def __init__(self, receive: Receive, bounds: HttpBounds, length: bytes | None, turns: asyncio.Semaphore) -> None:
        """turns: taken by one large body at a time."""
        self._receive, self._bounds, self._turns = receive, bounds, turns
        self._has_turn = False
        self._seen = 0
        self._until: float | None = None
        self._done = False
        self.failure: Refusal | None = None
        if length is not None and (not length.isdigit() or int(length) > bounds.body_bytes):
            raise Refusal(413, f"the body is larger than {bounds.body_bytes} bytes", code="too_large")

    async def receive(self) -> Message:
        if self._done:
            return await self._receive()  # waits for the disconnect
        loop = asyncio.get_running_loop()
        self._until = self._until or loop.time() + self._bounds.body_seconds
        try:
            async with asyncio.timeout_at(self._until):
                if self._seen > LARGE and not self._has_turn:
                    self._has_turn = await self._turns.acquire()
                message = await self._receive()
        except TimeoutError:
            raise self._fail(408, f"the body did not come within {self._bounds.body_seconds:g} s", "slow_body") from None
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            self._done = not message.get("more_body", False)
            if self._done:
                self.let_go()
            if self._seen > self._bounds.body_bytes:
                raise self._fail(413, f"the body is larger than {self._bounds.body_bytes} bytes", "too_large")
        return message

    def let_go(self) -> None:
        """The next large body may come in after a pause, however soon this one was refused."""
        if self._has_turn:
            self._has_turn = False
            asyncio.get_running_loop().call_later(PAUSE, self._turns.release)

    def _fail(self, status: int, message: str, code: str) -> Refusal:
        self.failure = Refusal(status, message, code=code)
        return self.failure


async def answer(refusal: Refusal, send: Send) -> None:
    """Send an error as OpenAI's clients expect it. Where what is left of a request is not read, the connection ends."""
    headers = [(b"content-type", b"application/json")]
    headers += [(k.encode(), v.encode()) for k, v in refusal.headers().items()]
    if refusal.close or refusal.status in (408, 413, 431):
        headers.append((b"connection", b"close"))
    body = json.dumps(refusal.body()).encode()
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
