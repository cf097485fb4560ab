"""Processes in which work on clients' texts is done, and killed where it takes too long.

A first process is forked while ours is still small and quiet. It forks the others, so that one that was killed is replaced in
milliseconds. Three of them work: one for short texts, one for short chats, and one for whatever is long. A hostile text or template holds
up its own kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ...errors import PrismError
from ...schema.read import one_line
from ..config import Bounds
from .desk import Desk
from .jobs import Compile, Encode, Job, RenderChat, Result, Unfit
from .nursery import Nursery

ENDED = "the process that forks those which read clients' texts has ended"

SHORT = 16 << 10
"""Bytes of a text that is short."""
LARGE = 256 << 10
"""Bytes of a text after which a process is replaced, so that the memory it took is given back."""
WALL = 15.0
"""A job may take so many times its processor time by the clock, on a machine with other work."""

WORK: dict[type, tuple[str, str]] = {
    Encode: ("tokenizing the prompt", "prompt"),
    RenderChat: ("the chat template", "messages"),
    Compile: ("reading the form", "structured_outputs"),
}
"""What is told of a kind of job, and the field it came from."""

_SIZE = struct.Struct("!Q")
_result: msgspec.msgpack.Decoder[Result] = msgspec.msgpack.Decoder(Result)
_encode = msgspec.msgpack.Encoder().encode


@dataclass
class Lane:
    """One process, and who waits for it."""

    free: asyncio.Lock = field(default_factory=asyncio.Lock)
    link: socket.socket | None = None
    pid: int = 0


class Workers:
    """Made before any thread is; `do` on the event loop. Without fork, threads do the work, and nothing can end it."""

    def __init__(self, desk: Desk, bounds: Bounds) -> None:
        self.desk, self._seconds = desk, bounds.text_seconds
        self._nursery = Nursery(desk, bounds.text_seconds, bounds.text_bytes) if hasattr(os, "fork") else None
        self._lanes: dict[str, Lane] = {}

    async def do(self, job: Job) -> Result:
        """What comes of a job; an Unfit where it took too long. PrismError once nothing can be done any more."""
        if self._nursery is None:
            return await asyncio.to_thread(self.desk.do, job)
        if self._nursery.ended():
            raise PrismError(ENDED, "start the server again; the log says more")
        try:
            body = _encode(job)
        except (OverflowError, UnicodeEncodeError) as error:  # JSON has numbers and text that no other process can be told
            return Unfit(f"it holds what cannot be passed on: {one_line(str(error), 120)}", _field(job), "invalid_value")
        size = _size(job)
        kind = "long" if size > SHORT or isinstance(job, Compile) else "chat" if isinstance(job, RenderChat) else "text"
        lane = self._lanes.setdefault(kind, Lane())
        async with lane.free:
            try:
                async with asyncio.timeout(WALL * self._seconds):
                    result = await self._ask(self._nursery, lane, body)
            except (TimeoutError, EOFError, OSError, msgspec.DecodeError):
                self._end(lane)
                return _too_costly(job, self._seconds)
            except BaseException:  # nobody waits for the answer, and the next one must not get it
                self._end(lane)
                raise
            if size > LARGE:
                self._end(lane)
            return result

    async def _ask(self, nursery: Nursery, lane: Lane, body: bytes) -> Result:
        if lane.link is not None and _gone(lane.link):  # killed while it had nothing to do
            self._end(lane)
        if lane.link is None:
            lane.link, lane.pid = await asyncio.to_thread(nursery.worker)
        link: Any = lane.link
        await asyncio.get_running_loop().sock_sendall(link, _SIZE.pack(len(body)) + body)
        (size,) = _SIZE.unpack(await _exactly(link, _SIZE.size))
        return _result.decode(await _exactly(link, size))

    def _end(self, lane: Lane) -> None:
        if lane.link is not None:
            lane.link.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(lane.pid, signal.SIGKILL)
        lane.link = None

    def ended(self) -> str | None:
        """Why no text can be read any more. A process with threads cannot fork another nursery, so the server has to start again."""
        return ENDED if self._nursery is not None and self._nursery.ended() else None

    def pids(self) -> list[int]:
        """Of the processes that work now."""
        return [lane.pid for lane in self._lanes.values() if lane.link is not None]

    def close(self) -> None:
        """End them all."""
        for lane in self._lanes.values():
            self._end(lane)
        if self._nursery is not None:
            self._nursery.close()


def _gone(link: socket.socket) -> bool:
    """Whether the other side has closed: nothing else comes unasked."""
    with contextlib.suppress(BlockingIOError):
        return not link.recv(1, socket.MSG_PEEK)
    return False


async def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray()
    loop = asyncio.get_running_loop()
    while len(data) < size:
        more = await loop.sock_recv(link, min(size - len(data), 1 << 20))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def _size(job: Job) -> int:
    if isinstance(job, Encode):
        return sum(len(text) for text in job.texts)
    if isinstance(job, RenderChat):
        return sum(len(str(message)) for message in job.messages)
    return len(job.text)


def _field(job: Job) -> str:
    """The field of a request that cannot be passed on."""
    if isinstance(job, RenderChat):
        for name, value in (("chat_template_kwargs", job.variables), ("tools", job.tools)):
            try:
                _encode(value)
            except (OverflowError, UnicodeEncodeError):
                return name
    return WORK[type(job)][1]


def _too_costly(job: Job, seconds: float) -> Unfit:
    said, param = WORK[type(job)]
    return Unfit(
        f"{said} took more than {seconds:g} s or too much memory (bounds.text_seconds, bounds.text_bytes)", param, "too_costly"
    )
