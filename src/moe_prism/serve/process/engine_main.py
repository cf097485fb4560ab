"""The engine's process, from the inside: `python -m moe_prism.serve.process.engine_main SOCKET`. See docs/explanation/serving.md."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
import threading
import traceback
from functools import partial
from typing import TYPE_CHECKING

from ...errors import PrismError
from ..requests import ErrorKind, Event, Request
from .messages import Cancel, Changed, Failed, Link, LoadAdapter, News, Start, Submit, UnloadAdapter
from .spawn import STOP

if TYPE_CHECKING:
    from ..backend import Ran
    from ..engine.engine import Engine

logger = logging.getLogger(__name__)

PULSE = 0.25  # seconds between signs of life


class Outbox:
    """Gathers what a step has to say and sends it as one message."""

    def __init__(self, link: Link, engine: Engine) -> None:
        self._link, self._engine = link, engine
        self._events: list[tuple[str, Event]] = []

    def hear(self, request_id: str, event: Event) -> None:
        """In the engine's thread: a sink. An error may come between two steps and does not wait for the next."""
        self._events.append((request_id, event))
        if event.error is not None:
            self._send(News(self._engine.last_turn, self._engine.gauges(), events=self._taken()))

    def observe(self, step: Ran, seconds: float) -> None:
        """In the engine's thread, after every step."""
        self._send(News(self._engine.last_turn, self._engine.gauges(), step.tally(seconds), step.told(), self._taken()))

    def pulse(self) -> None:
        """In any thread."""
        self._send(News(self._engine.last_turn, self._engine.gauges()))

    def refuse(self, request_id: str, error: str, kind: ErrorKind = ErrorKind.ENGINE) -> None:
        """In any thread: a request that the engine did not take."""
        self._send(News(self._engine.last_turn, self._engine.gauges(), events=((request_id, Event(error=error, kind=kind)),)))

    def changed(self, name: str, error: PrismError | None) -> None:
        """In any thread: what became of a change of adapters."""
        failed = None if error is None else told(error)
        with contextlib.suppress(OSError):
            self._link.send(Changed(name, failed, tuple(self._engine.adapters.values())))

    def _taken(self) -> tuple[tuple[str, Event], ...]:
        events, self._events = tuple(self._events), []
        return events

    def _send(self, news: News) -> None:
        with contextlib.suppress(OSError):  # nobody is left to hear it, and the life line will end us
            self._link.send(news)


def main(handle: int) -> int:
    """Serve requests that come over the socket until told to stop. Returns the exit code."""
    ending = threading.Event()
    threading.Thread(target=_life_line, args=(ending,), daemon=True).start()
    link = Link(socket.socket(fileno=handle))
    try:
        start: Start = link.receive()
    except (EOFError, OSError):
        return 1
    from .. import logs

    folder, options, config = start.read()
    logs.set_up(options.debug)
    try:
        from ..engine.start import start_engine

        running = start_engine(folder, options, config, start.cost, start.loaded)
    except Exception as error:  # noqa: BLE001 - told where it can be told
        link.send(told(error))
        return 1
    engine = running.engine
    outbox = Outbox(link, engine)
    gc.collect()
    gc.freeze()  # as in `server.run`
    link.send(running.facts)  # the first message: the last step of the probe may still be running
    running.watch(outbox.observe)
    threading.Thread(target=_receive, args=(link, engine, outbox), daemon=True).start()
    while engine.alive and not ending.wait(PULSE):
        outbox.pulse()
    link.end()
    running.stop()
    return 0 if ending.is_set() else 1


def _life_line(ending: threading.Event) -> None:
    """Our standard input ends when the HTTP process does, however it does, and then there is nobody to compute for."""
    if sys.stdin.buffer.read() != STOP:
        os._exit(1)
    ending.set()


def _receive(link: Link, engine: Engine, outbox: Outbox) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = link.receive()
            if isinstance(message, Cancel):
                engine.cancel(message.id)
            elif isinstance(message, LoadAdapter):
                engine.adapting.load(message.name, message.folder, partial(outbox.changed, message.name))
            elif isinstance(message, UnloadAdapter):
                engine.adapting.unload(message.name, partial(outbox.changed, message.name))
            else:
                _submit(message, engine, outbox)


def _submit(message: Submit, engine: Engine, outbox: Outbox) -> None:
    job, tokens, sampling, stop_ids, deadline, salt, adapter = message
    try:
        engine.submit(Request(job, tokens, sampling, stop_ids, partial(outbox.hear, job.id), deadline, salt, adapter))
    except PrismError as error:
        outbox.refuse(job.id, error.cause, ErrorKind.REFUSED if sampling.is_beside and engine.alive else ErrorKind.ENGINE)
    except Exception:
        logger.exception("a request could not be queued")
        outbox.refuse(job.id, "the engine could not take the request")


def told(error: Exception) -> Failed:
    """The error as it can be sent, with our stack trace where it is not explained."""
    if isinstance(error, PrismError):
        return Failed(type(error).__name__, error.cause, error.next_step)
    return Failed("", "in the engine's process:\n" + "".join(traceback.format_exception(error)), "")


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    logging.shutdown()
    os._exit(code)  # some libraries (triton) have much to say when the interpreter ends, in the middle of our log
