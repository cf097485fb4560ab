"""What the HTTP process and the engine's process say to each other: pickled tuples over a socket pair, each after its length.

Both ends are ours and nobody else can reach them, so unpickling is safe.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...options.serve import ServeOptions
from ...schedule.base import Job, Ladder
from ..backend import Gauges, Tally
from ..config import Config
from ..requests import Event, Sampling

_LENGTH = struct.Struct("!Q")

# ---- to the engine


class Start(NamedTuple):
    """The first message."""

    folder: Path
    options: ServeOptions
    config: Config


class Submit(NamedTuple):
    """A request without its sink."""

    job: Job
    tokens: list[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    deadline: float | None


class Cancel(NamedTuple):
    """Drop a request."""

    id: str


# ---- from the engine


class Facts(NamedTuple):
    """The answer to `Start`: what does not change while the engine runs."""

    ladder: Ladder
    context: int
    eos: frozenset[int]
    vocabulary: int
    policy_name: str
    rate: float  # prompt tokens per second
    ladder_from: str
    cost_from: str


class Failed(NamedTuple):
    """The other answer to `Start`."""

    error: Exception


class News(NamedTuple):
    """One step, or a sign of life between two."""

    turn: float  # Backend.last_turn
    gauges: Gauges
    tally: Tally | None = None
    parts: tuple[tuple[str, int, int, int], ...] = ()  # request, level, tokens computed, tokens found in the prefix cache
    events: tuple[tuple[str, Event], ...] = ()  # request, what happened to it


# ---- both


def pack(message: object) -> bytes:
    """A message as it goes over the wire."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts arriving bytes into messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are whole now."""
        self._held += data
        start, size = 0, _LENGTH.size
        while len(self._held) >= start + size:
            end = start + size + _LENGTH.unpack_from(self._held, start)[0]
            if len(self._held) < end:
                break
            yield pickle.loads(memoryview(self._held)[start + size : end])  # noqa: S301 - from ourselves
            start = end
        del self._held[:start]


class Link:
    """A socket that blocks. `send` may be called from any thread, `receive` from one."""

    def __init__(self, socket: socket.socket) -> None:
        self.socket = socket
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """OSError if the other side is gone."""
        data = pack(message)
        with self._lock:
            self.socket.sendall(data)

    def receive(self) -> Any:
        """The next message. EOFError if there will be none."""
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return pickle.loads(self._exactly(size))  # noqa: S301 - from ourselves

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self.socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return data

    def end(self) -> None:
        """No more messages either way; wakes a thread that waits in `send` or `receive`."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other side was first
