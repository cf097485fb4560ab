"""What the HTTP process and the engine's process say to each other over a socket pair: a kind and msgpack of that kind's type, after its
length. Data only: no byte of it can become an object of another type.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ... import errors
from ...errors import PrismError
from ...options.serve import ServeOptions
from ...point import OperatingPoint
from ...schedule.base import Job, Ladder, Level
from ..backend import AdapterFacts, Gauges, Tally
from ..config import Config
from ..requests import Event, Sampling

if TYPE_CHECKING:
    from ...store import StoreOptions

_HEAD = struct.Struct("!QB")  # bytes that follow, kind

# ---- to the engine


class Start(NamedTuple):
    """The first message, in plain values."""

    folder: str
    options: dict[str, Any]
    store: dict[str, Any] | None
    config: str
    cost: dict[str, Any] | None  # what an engine before it has measured
    loaded: tuple[str, ...] = ()  # NAME=FOLDER of adapters that were loaded into that one while it ran

    @classmethod
    def of(cls, folder: Path, options: ServeOptions, config: Config, cost: dict[str, Any] | None = None) -> Start:
        """The engine is not told the key: it has no use for it."""
        kept = options.store
        store = (
            None if kept is None else {f.name: getattr(kept, f.name) for f in fields(kept) if f.name not in ("reader", "tier")}
        )
        plain = msgspec.to_builtins(replace(options, store=None, api_key=None), enc_hook=str)
        return cls(str(folder), plain, msgspec.to_builtins(store, enc_hook=str), config.model_dump_json(), cost)

    def read(self) -> tuple[Path, ServeOptions, Config]:
        """What `of` was given."""
        options = msgspec.convert(self.options, ServeOptions, dec_hook=_made)
        return Path(self.folder), replace(options, store=self._store()), Config.model_validate_json(self.config)

    def _store(self) -> StoreOptions | None:
        if self.store is None:
            return None
        from ...store import StoreOptions
        from ...store.choose_misses import Misses

        paths = {name: Path(self.store[name]) if self.store[name] else None for name in ("file", "fitted")}
        misses = msgspec.convert(self.store["misses"], Misses)
        return StoreOptions(**{**self.store, **paths, "misses": misses})


def _made(kind: type, value: Any) -> Any:
    """A path from its text."""
    return kind(value)


class Submit(NamedTuple):
    """A request without its sink."""

    job: Job
    tokens: list[int]
    sampling: Sampling
    stop_ids: frozenset[int]
    deadline: float | None
    salt: str = ""
    adapter: str = ""


class Cancel(NamedTuple):
    """Drop a request."""

    id: str


class LoadAdapter(NamedTuple):
    """Load a folder under a name; `Changed` answers."""

    name: str
    folder: str


class UnloadAdapter(NamedTuple):
    """Take one out; `Changed` answers."""

    name: str


# ---- from the engine


class Facts(NamedTuple):
    """The answer to `Start`: what does not change while the engine runs. cost: the cost model as it was at the start."""

    levels: list[dict[str, Any]]  # as `Level.to_json` has them
    context: int
    eos: frozenset[int]
    vocabulary: int
    policy_name: str
    rate: float  # prompt tokens per second
    ladder_from: str
    cost_from: str
    cost: dict[str, Any]
    adapters: tuple[AdapterFacts, ...] = ()  # that it was started with

    @property
    def ladder(self) -> Ladder:
        """The levels, read."""
        return Ladder(
            tuple(Level(v["name"], OperatingPoint.from_json(v["point"]), v["slots"], v["quality"]) for v in self.levels)
        )


class Failed(NamedTuple):
    """The other answer to `Start`. kind: which of our errors it is, empty for one that is not explained."""

    kind: str
    cause: str
    next_step: str

    def error(self) -> Exception:
        """To be raised on the other side."""
        made = getattr(errors, self.kind, None) if self.kind else None
        if isinstance(made, type) and issubclass(made, PrismError):
            return made(self.cause, self.next_step)
        return RuntimeError(self.cause)


class Changed(NamedTuple):
    """What became of a `LoadAdapter` or an `UnloadAdapter`: the adapters that are loaded now, or why nothing was changed."""

    name: str
    failed: Failed | None
    adapters: tuple[AdapterFacts, ...]


class News(NamedTuple):
    """One step, or a sign of life between two."""

    turn: float  # Backend.last_turn
    gauges: Gauges
    tally: Tally | None = None
    parts: tuple[tuple[str, int, int, int], ...] = ()  # request, level, tokens computed, tokens found in the prefix cache
    events: tuple[tuple[str, Event], ...] = ()  # request, what happened to it


# ---- both

KINDS: tuple[type[Any], ...] = (
    Start, Submit, Cancel, LoadAdapter, UnloadAdapter, Facts, Failed, Changed, News,
)  # fmt: skip
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_encoder = msgspec.msgpack.Encoder()
_decoders = [msgspec.msgpack.Decoder(kind) for kind in KINDS]


def pack(message: Any) -> bytes:
    """A message as it goes over the wire."""
    body = _encoder.encode(message)
    return _HEAD.pack(len(body), _NUMBERS[type(message)]) + body


class Frames:
    """Cuts arriving bytes into messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that are whole now."""
        self._held += data
        start = 0
        while len(self._held) >= start + _HEAD.size:
            size, kind = _HEAD.unpack_from(self._held, start)
            end = start + _HEAD.size + size
            if len(self._held) < end:
                break
            yield _decoders[kind].decode(memoryview(self._held)[start + _HEAD.size : end])
            start = end
        del self._held[:start]


class Link:
    """A socket that blocks. `send` may be called from any thread, `receive` from one."""

    def __init__(self, socket: socket.socket) -> None:
        self.socket = socket
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """OSError if the other side is gone."""
        data = pack(message)
        with self._lock:
            self.socket.sendall(data)

    def receive(self) -> Any:
        """The next message. EOFError if there will be none."""
        size, kind = _HEAD.unpack(self._exactly(_HEAD.size))
        return _decoders[kind].decode(self._exactly(size))

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
