"""The engine in another process, as the HTTP side sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping

from ...errors import PrismError, UsageError
from ..backend import AdapterFacts, Gauges, Tally
from ..requests import Event, Request
from .messages import Cancel, Changed, Facts, Frames, LoadAdapter, News, Submit, UnloadAdapter, pack
from .spawn import EngineProcess

logger = logging.getLogger(__name__)


class RemoteEngine(asyncio.Protocol):
    """A Backend. The event loop itself reads and writes the socket, so that no thread competes with it for the interpreter, and a process
    that does not read never makes it wait.
    """

    def __init__(self, process: EngineProcess, facts: Facts) -> None:
        self._process = process
        self.ladder, self.context, self.eos = facts.ladder, facts.context, facts.eos
        self.vocabulary, self.policy_name = facts.vocabulary, facts.policy_name
        self.book: dict[str, Request] = {}
        self._adapters = {own.name: own for own in facts.adapters}
        self._changing: dict[str, asyncio.Future[Exception | None]] = {}
        self.observer: Callable[[Tally], None] | None = None
        self.last_turn = self.clock()
        self._gauges = Gauges()
        self._frames = Frames()
        self._transport: asyncio.WriteTransport | None = None
        self._lost = self._leaving = False
        self._ended: str | None = None
        self._hung = 0.0  # seconds, if that is why it was killed
        self._mourning: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()

    def clock(self) -> float:
        """The same clock in both processes: it counts from the start of the machine."""
        return time.monotonic()

    @property
    def alive(self) -> bool:
        return not self._lost

    @property
    def pid(self) -> int:
        return self._process.pid

    async def attach(self) -> None:
        """Read and write on this loop from now on."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._process.link.socket)

    async def gone(self) -> str:
        """Waits until the process has ended by itself, and says how. What it held on our side is let go."""
        await self._closed.wait()
        if self._mourning is None:  # it was told to end
            await asyncio.Event().wait()
        assert self._mourning is not None
        await self._mourning
        await asyncio.to_thread(self._process.kill)
        return self._ended or ""

    async def detach(self) -> None:
        """The loop ends."""
        self._leaving = True
        if self._mourning is not None:
            await self._mourning
        if self._transport is not None:
            self._transport.close()

    def submit(self, request: Request) -> None:
        """As Engine.submit. Sinks are called on the event loop."""
        if self._lost or self._transport is None:
            raise PrismError("the engine has stopped", "restart the server; the log says why")
        if request.job.id in self.book:
            raise UsageError(f"request id '{request.job.id}' is in use", "choose another")
        self.book[request.job.id] = request
        message = Submit(request.job, list(request.tokens), request.sampling, request.stop_ids, request.deadline, request.salt)
        message = message._replace(adapter=request.adapter)
        self._transport.write(pack(message))

    @property
    def adapters(self) -> Mapping[str, AdapterFacts]:
        """As of the last change."""
        return self._adapters

    async def load_adapter(self, name: str, folder: str) -> None:
        """As Engine.load_adapter."""
        await self._change(name, LoadAdapter(name, folder))

    async def unload_adapter(self, name: str) -> None:
        """As Engine.unload_adapter."""
        await self._change(name, UnloadAdapter(name))

    async def _change(self, name: str, message: LoadAdapter | UnloadAdapter) -> None:
        if self._lost or self._transport is None:
            raise PrismError("the engine has stopped", "restart the server; the log says why")
        if name in self._changing:
            raise UsageError(f"adapter '{name}' is being changed", "wait for it")
        ended = self._changing[name] = asyncio.get_running_loop().create_future()
        try:
            self._transport.write(pack(message))
            error = await ended
        finally:
            del self._changing[name]
        if error is not None:
            raise error

    def cancel(self, request_id: str) -> None:
        """As Engine.cancel."""
        if self.book.pop(request_id, None) is not None and self._transport is not None:
            self._transport.write(pack(Cancel(request_id)))

    def gauges(self) -> Gauges:
        """As of the last message; they come at least four times a second."""
        return self._gauges

    def give_up(self, seconds: float) -> None:
        """Kill a process that hangs; its socket closes then, as if it had died by itself."""
        self._hung = seconds
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> str | None:
        """How the process ended, if it did so by itself."""
        return self._ended

    def stop(self) -> None:
        """End the process and wait for it."""
        self._leaving = self._lost = True
        self._process.stop()
        self._finish_all("the server stopped")

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for news in self._frames.feed(data):
            if isinstance(news, Changed):
                self._adapters = {own.name: own for own in news.adapters}
                self._end_change(news.name, None if news.failed is None else news.failed.error())
            else:
                self._take(news)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        for name in list(self._changing):
            self._end_change(name, PrismError("the engine stopped", "ask again"))
        if not self._leaving:
            self._ended = "the engine's process ended"
            self._finish_all("the engine stopped")
            self._mourning = asyncio.get_running_loop().create_task(self._mourn())
        self._closed.set()

    async def _mourn(self) -> None:
        """Say once how it ended, which may be known a moment later than that it did."""
        outcome = await asyncio.to_thread(self._process.outcome)
        self._ended = f"the engine's process {outcome}"
        if self._hung:
            self._ended = f"the engine hung: no turn for {self._hung:g} s (bounds.step_seconds); its process was killed"
        logger.error(self._ended)

    def _end_change(self, name: str, error: Exception | None) -> None:
        waiting = self._changing.get(name)
        if waiting is not None and not waiting.done():
            waiting.set_result(error)

    def _take(self, news: News) -> None:
        self.last_turn, self._gauges = news.turn, news.gauges
        for request_id, level, tokens, cached in news.parts:
            request = self.book.get(request_id)
            if request is not None:
                request.levels[level] = request.levels.get(level, 0) + tokens
                request.cached_tokens = cached
                request.begun = news.turn if request.begun is None else request.begun
                request.track.advance(level=level)
        for request_id, event in news.events:
            request = self.book.get(request_id)
            if request is not None:  # else it was cancelled while this was on its way
                self._tell(request, event)
        if news.tally is not None and self.observer is not None:
            self.observer(news.tally)

    def _tell(self, request: Request, event: Event) -> None:
        if event.finish or event.error:
            del self.book[request.job.id]
        request.sink(event)

    def _finish_all(self, error: str) -> None:
        for request in list(self.book.values()):
            self._tell(request, Event(error=error))
