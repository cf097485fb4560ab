"""A uvicorn server that drains on the first signal and ends on the second, whatever stands behind it."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple, Protocol

from ..config import HttpBounds
from .connection import paced_protocol
from .crowd import Doorway
from .guard import Guard

logger = logging.getLogger(__name__)

LAST_WORDS = 0.5
"""Seconds for answers to requests that are cut off."""
FAREWELL = 1.0
"""Seconds for which a server that lost what it needs says so with 503, before it ends too."""


class Counted(Protocol):
    """Who is in the house. leaving: routers shall look elsewhere; draining: nobody new comes in."""

    requests: int
    leaving: bool
    draining: bool


class Behind(NamedTuple):
    """What a server asks of what stands behind it. look: asked ten times a second, whether to end; cut_off: tell whoever still waits."""

    look: Callable[[], bool]
    cut_off: Callable[[], None]


def draining_server(app: Guard, bounds: HttpBounds, door: Counted, behind: Behind) -> Any:
    """A uvicorn server with our deadlines; `run(sockets=[...])` returns after the drain, or when `behind` has ended by itself."""
    import uvicorn

    protocol = paced_protocol(bounds)

    class Server(uvicorn.Server):  # type: ignore[misc]
        """Drains on the first signal, ends on the second."""

        _until = math.inf
        _draining: asyncio.Task[None] | None = None
        _ending: asyncio.Task[None] | None = None

        async def on_tick(self, counter: int) -> bool:
            """Whether to end now. uvicorn asks ten times a second."""
            if self._until == math.inf and behind.look():
                self._until = time.monotonic() + FAREWELL
            return await super().on_tick(counter) or time.monotonic() >= self._until

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            loop = asyncio.get_event_loop()
            if door.leaving:
                self._ending = loop.create_task(self._end())
                return
            door.leaving = True
            door.draining = not bounds.drain_delay
            logger.info("draining", extra={"fields": {"signal": signal.Signals(sig).name, "requests": door.requests}})
            self._draining = loop.create_task(self._drain())

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            for listening in sockets or ():
                if isinstance(listening, Doorway):
                    listening.crowd = protocol.crowd
            await super().startup(sockets)

        async def _drain(self) -> None:
            await asyncio.sleep(bounds.drain_delay)
            door.draining = True
            until = time.monotonic() + bounds.drain_seconds
            while door.requests and time.monotonic() < until:  # noqa: ASYNC110 - places are counted, there is no event to wait for
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.05)  # the last bytes
            await self._end()

        async def _end(self) -> None:
            """Whoever still waits is told so."""
            behind.cut_off()
            await asyncio.sleep(0.02)  # streams say it in an event of their own
            await app.end_all(LAST_WORDS)
            self.should_exit = True

    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        http=protocol,
        loop="asyncio",  # others accept connections without our doorway
        h11_max_incomplete_event_size=bounds.header_bytes,
        timeout_keep_alive=int(max(1, bounds.header_seconds)),
        timeout_graceful_shutdown=1,
    )
    return Server(settings)
