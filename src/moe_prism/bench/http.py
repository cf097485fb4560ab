"""A small HTTP/1.1 client on asyncio: one request per connection, the body handed on with the time at which it came.

Written here because the time is the point: it is read when the bytes are, and nothing is awaited between the two.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from urllib.parse import urlsplit

from ..errors import UsageError

HEAD_LIMIT = 64 << 10
Clock = Callable[[], float]
Hear = Callable[[float, bytes], None]  # the time, and a part of the body


class Broken(Exception):
    """The connection ended early, or what came is no HTTP."""


@dataclass(frozen=True)
class Address:
    """Where an OpenAI server is. `path` ends with the version, without a slash."""

    host: str
    port: int
    path: str
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Address:
        """`/v1` is added where it is missing. UsageError if this is no address."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise UsageError(f"'{url}' is no address: {error}", "give one like http://127.0.0.1:8000/v1") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"'{url}' is no http address", "give one like http://127.0.0.1:8000/v1")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/")
        return cls(parts.hostname, port or (443 if tls else 80), path if path.endswith("/v1") else f"{path}/v1", tls)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.path}"

    def request(self, method: str, route: str, key: str | None = None, body: bytes = b"") -> bytes:
        """The bytes of a request."""
        lines = [
            f"{method} {self.path}{route} HTTP/1.1",
            f"host: {self.host}:{self.port}",
            "connection: close",
            "accept-encoding: identity",
            "user-agent: moe-prism-bench",
        ]
        lines += [f"authorization: Bearer {key}"] if key else []
        lines += ["content-type: application/json", f"content-length: {len(body)}"] if body else []
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass
class ResponseReader:
    """A response, fed as its bytes come."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    done: bool = False
    _buffer: bytearray = field(default_factory=bytearray)
    _left: int | None = None  # bytes of the body, or of its chunk, still to come; None: until the connection ends
    _chunked: bool = False

    def feed(self, data: bytes) -> bytes:
        """What these bytes add to the body. Broken if they are no HTTP."""
        self._buffer += data
        while not self.status:
            if not self._head():
                return b""
        if self._chunked:
            return self._chunks()
        part = bytes(self._buffer) if self._left is None else bytes(self._buffer[: self._left])
        del self._buffer[: len(part)]
        if self._left is not None:
            self._left -= len(part)
            self.done = self._left == 0
        return part

    def end(self) -> None:
        """The connection ended. Broken if the response had not."""
        if self.status and not self._chunked and self._left is None:
            self.done = True
        if not self.done:
            raise Broken("the connection ended before the answer did")

    def _head(self) -> bool:
        """Read status line and headers; False while they are incomplete."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise Broken("the answer's headers do not end")
            return False
        first, _, rest = bytes(self._buffer[:end]).partition(b"\r\n")
        del self._buffer[: end + 4]
        parts = first.split(None, 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise Broken("the answer is no HTTP")
        if parts[1].startswith(b"1"):
            return True  # an interim response; the real one follows
        self.status = int(parts[1])
        self.headers = _headers(rest)
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        length = self.headers.get("content-length", "")
        self._left = 0 if self._chunked else int(length) if length.isdigit() else None
        self.done = not self._chunked and self._left == 0
        return True

    def _chunks(self) -> bytes:
        out = bytearray()
        while self._buffer and not self.done:
            if self._left:
                part = self._buffer[: self._left]
                out += part
                self._left -= len(part)
                del self._buffer[: len(part)]
                continue
            end = self._buffer.find(b"\r\n")
            if end < 0:
                break
            line = bytes(self._buffer[:end]).partition(b";")[0].strip()
            del self._buffer[: end + 2]
            if line:  # else the line end after a chunk
                try:
                    self._left = int(line, 16)
                except ValueError as error:
                    raise Broken("a chunk of the answer has no size") from error
                self.done = self._left == 0
        return bytes(out)


def _headers(raw: bytes) -> dict[str, str]:
    from http.client import parse_headers

    return {name.lower(): value for name, value in parse_headers(BytesIO(raw + b"\r\n\r\n")).items()}


class Call(asyncio.Protocol):
    """One connection and the one answer on it. `finished` is done when the answer is, or has the exception."""

    def __init__(self, clock: Clock, hear: Hear) -> None:
        self.reader = ResponseReader()
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock, self._hear = clock, hear
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: bytes) -> float:
        """Hand the request to the socket; returns when."""
        assert self._transport is not None
        now = self._clock()
        self._transport.write(request)
        return now

    def data_received(self, data: bytes) -> None:
        now = self._clock()
        try:
            part = self.reader.feed(data)
        except Broken as error:
            self._finish(error)
            return
        if part:
            self._hear(now, part)
        if self.reader.done:
            self._finish(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.finished.done():
            return
        try:
            self.reader.end()
        except Broken as broken:
            self._finish(broken)
        else:
            self._finish(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self.finished.cancel()

    def _finish(self, error: Exception | None) -> None:
        if not self.finished.done():
            if error is None:
                self.finished.set_result(None)
            else:
                self.finished.set_exception(error)
        if self._transport is not None:
            self._transport.close()


async def dial(address: Address, clock: Clock, hear: Hear) -> Call:
    """An open connection. OSError if there is none to be had."""
    context = ssl.create_default_context() if address.tls else None
    loop = asyncio.get_running_loop()
    _, call = await loop.create_connection(lambda: Call(clock, hear), address.host, address.port, ssl=context)
    return call


async def fetch(
    address: Address, method: str, route: str, key: str | None, body: bytes = b"", seconds: float = 30.0
) -> tuple[ResponseReader, bytes]:
    """A whole answer. OSError, Broken, or TimeoutError."""
    content = bytearray()
    async with asyncio.timeout(seconds):
        call = await dial(address, asyncio.get_running_loop().time, lambda _, part: content.extend(part))
        try:
            call.send(address.request(method, route, key, body))
            await call.finished
        finally:
            call.close()
    return call.reader, bytes(content)
