"""Adapters that come and go while the engine runs: files are read beside it, and memory changes between two of its steps."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping

from ...adapters.file import Adapter, read_adapter
from ...elastic.adapters import Adapters, Loaded
from ...errors import PrismError, UsageError
from ..backend import AdapterFacts, Told
from ..requests import Request

Change = Callable[[], None]


class Adapting:
    """The engine's adapters. `load` and `unload` may be called from any thread; `turn` is called by the engine's, between its steps."""

    def __init__(self, adapters: Adapters | None, book: Mapping[str, Request], wake: Callable[[], None]) -> None:
        """adapters: None where the engine has no room for any; book: unfinished requests; wake: of an engine that has nothing to do."""
        self._adapters, self._book, self._wake = adapters, book, wake
        self._waiting: deque[tuple[Change, Told]] = deque()
        self.lock = threading.Lock()
        """Held while a request enters the book, and while an adapter leaves: no request is left without its adapter."""

    @property
    def loaded(self) -> Mapping[str, Loaded]:
        """By name."""
        return {} if self._adapters is None else self._adapters.loaded

    @property
    def facts(self) -> dict[str, AdapterFacts]:
        """The same, as others are told."""
        return {name: _facts(own) for name, own in list(self.loaded.items())}

    def digest(self, name: str) -> str:
        """What tells prefixes of this adapter from those of others; "" of the base model."""
        return self.loaded[name].digest if name else ""

    def check(self, name: str) -> None:
        """UsageError for an adapter that is not loaded. With `lock` held."""
        if name and name not in self.loaded:
            raise UsageError(f"no adapter '{name}' is loaded", "ask /v1/models which are")

    def load(self, name: str, folder: str, told: Told) -> None:
        """Read a folder in a thread of its own, and have it loaded between two steps. told: hears of the end, in whatever thread."""

        def read() -> None:
            try:
                adapter = read_adapter(folder)
            except (PrismError, OSError, MemoryError) as error:
                told(_as_ours(error))
                return
            self._ask(lambda: self._load(name, adapter), told)

        threading.Thread(target=read, name="adapter", daemon=True).start()

    def unload(self, name: str, told: Told) -> None:
        """Have it taken out between two steps. It is refused while requests use it."""
        self._ask(lambda: self._unload(name), told)

    def _ask(self, change: Change, told: Told) -> None:
        self._waiting.append((change, told))
        self._wake()

    def _room(self) -> Adapters:
        if self._adapters is None:
            raise UsageError("the server was started without room for adapters", "start it with --adapter-folder")
        return self._adapters

    def _load(self, name: str, adapter: Adapter) -> None:
        self._room().load(name, adapter)

    def _unload(self, name: str) -> None:
        with self.lock:
            using = sum(request.adapter == name for request in list(self._book.values()))
            if using:
                raise UsageError(f"{using} requests use adapter '{name}'", "try again when they have ended")
            self._room().unload(name)

    def turn(self) -> None:
        """Make the changes that were asked for."""
        while self._waiting:
            change, told = self._waiting.popleft()
            try:
                change()
            except (PrismError, MemoryError) as error:
                told(_as_ours(error))
            else:
                told(None)


def _as_ours(error: Exception) -> PrismError:
    return (
        error if isinstance(error, PrismError) else PrismError(f"the adapter cannot be loaded: {error}", "see the server's log")
    )


def _facts(own: Loaded) -> AdapterFacts:
    return AdapterFacts(own.name, own.experts, own.bytes, own.digest)


async def told_of(ask: Callable[[Told], None]) -> None:
    """Wait for the end of a change that is made in another thread. Raises why it was not made."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[PrismError | None] = loop.create_future()

    def end(error: PrismError | None) -> None:
        if not ended.done():
            ended.set_result(error)

    def post(error: PrismError | None) -> None:
        loop.call_soon_threadsafe(end, error)

    ask(post)
    if (error := await ended) is not None:
        raise error
