"""An engine that outlives its process: one that dies or hangs is started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping

from ...schedule.base import Ladder
from ..backend import AdapterFacts, Gauges, State, Tally
from ..requests import Request
from .messages import Facts, Start
from .remote_engine import RemoteEngine
from .spawn import EngineProcess

logger = logging.getLogger(__name__)

PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each try to start an engine again. There are no more tries than these."""
HEALTHY = 60.0
"""Seconds after which an engine that ends has not ended because of how it was started, and the tries count from the first again."""
START = 60.0
"""Seconds that a start may always take; a start may take four times as long as the first one did."""


LOOKS = 1.0
"""Seconds between two looks at an engine after which whoever looks was stopped too, and knows nothing of the time between."""


class Watch:
    """How long an engine has been seen not to turn. A machine that was suspended, or a container that was paused, stops the one who looks
    as well: that time is nobody's hanging.
    """

    def __init__(self) -> None:
        self._turn, self._looked, self._seen = -math.inf, math.inf, 0.0

    def still(self, turn: float, now: float) -> float:
        """Seconds since the last turn in which somebody looked. turn: of the engine's clock, as it has told."""
        if turn != self._turn:
            self._turn, self._seen = turn, 0.0
        else:
            self._seen += min(now - self._looked, LOOKS)
        self._looked = now
        return self._seen


class Supervisor:
    """A Backend. Requests in flight when a process ends get an error at once; new ones are refused until the next one runs."""

    def __init__(
        self,
        start: Start,
        process: EngineProcess,
        facts: Facts,
        seconds: float,
        spawn: Callable[[Start], EngineProcess] = EngineProcess,
    ) -> None:
        """start, process, facts: of the first one, which took `seconds`."""
        self._start = start._replace(cost=facts.cost)  # nothing is measured twice
        self._spawn, self._facts, self._patience = spawn, facts, max(START, 4 * seconds)
        self._engine = RemoteEngine(process, facts)
        self._starting: EngineProcess | None = None
        self._tries = self._restarts = self._failed_steps = 0
        self._since = self.clock()
        self._ended: str | None = None
        self._leaving = False
        self._watch: asyncio.Task[None] | None = None
        self._observer: Callable[[Tally], None] | None = None

    # ---- what does not change

    @property
    def ladder(self) -> Ladder:
        return self._engine.ladder

    @property
    def context(self) -> int:
        return self._facts.context

    @property
    def eos(self) -> frozenset[int]:
        return self._facts.eos

    @property
    def vocabulary(self) -> int:
        return self._facts.vocabulary

    @property
    def policy_name(self) -> str:
        return self._facts.policy_name

    def clock(self) -> float:
        return time.monotonic()

    # ---- the engine of the moment

    @property
    def observer(self) -> Callable[[Tally], None] | None:
        return self._observer

    @observer.setter
    def observer(self, heard: Callable[[Tally], None]) -> None:
        self._observer = self._engine.observer = heard

    @property
    def book(self) -> Mapping[str, Request]:
        return self._engine.book

    @property
    def pid(self) -> int:
        return self._engine.pid

    @property
    def alive(self) -> bool:
        return self._engine.alive

    @property
    def state(self) -> State:
        return "ready" if self.alive else "stopped" if self._ended or self._leaving else "restarting"

    @property
    def last_turn(self) -> float:
        return self._engine.last_turn

    def gauges(self) -> Gauges:
        """Failed steps of all engines so far."""
        now = self._engine.gauges() if self.alive else Gauges()
        return now._replace(failed_steps=self._failed_steps + now.failed_steps, restarts=self._restarts)

    def submit(self, request: Request) -> None:
        """As Engine.submit. Sinks are called on the event loop."""
        self._engine.submit(request)

    def cancel(self, request_id: str) -> None:
        """As Engine.cancel."""
        self._engine.cancel(request_id)

    @property
    def adapters(self) -> Mapping[str, AdapterFacts]:
        return self._engine.adapters

    async def load_adapter(self, name: str, folder: str) -> None:
        """As Engine.load_adapter. The next process is started with it too."""
        await self._engine.load_adapter(name, folder)
        self._start = self._start._replace(loaded=(*self._start.loaded, f"{name}={folder}"))

    async def unload_adapter(self, name: str) -> None:
        """As Engine.unload_adapter. The next process is started without it."""
        await self._engine.unload_adapter(name)
        kept = [
            [e for e in every if e.partition("=")[0] != name] for every in (self._start.options["adapters"], self._start.loaded)
        ]
        self._start = self._start._replace(options={**self._start.options, "adapters": kept[0]}, loaded=tuple(kept[1]))

    def give_up(self, seconds: float) -> None:
        """Kill a process that hangs; another one follows."""
        self._engine.give_up(seconds)

    def ended(self) -> str | None:
        """Why the last one ended, once nobody tries any more."""
        return self._ended

    # ---- from one engine to the next

    async def attach(self) -> None:
        """Read and write on this loop from now on."""
        await self._engine.attach()
        self._watch = asyncio.get_running_loop().create_task(self._supervise())

    async def detach(self) -> None:
        """The loop ends."""
        self._leaving = True
        if self._starting is not None:
            self._starting.kill()
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await self._engine.detach()

    def stop(self) -> None:
        """End the process and wait for it."""
        self._leaving = True
        self._engine.stop()

    async def _supervise(self) -> None:
        while True:
            reason = await self._engine.gone()
            self._failed_steps += self._engine.gauges().failed_steps
            if self.clock() - self._since > HEALTHY:
                self._tries = 0
            engine = await self._another()
            if engine is None:
                self._ended = f"{reason}; it was started again {self._tries} times and did not stay"
                logger.error("not ready", extra={"fields": {"tries": self._tries}})
                return
            self._engine, self._since = engine, self.clock()
            self._restarts += 1

    async def _another(self) -> RemoteEngine | None:
        while self._tries < len(PAUSES):
            await asyncio.sleep(PAUSES[self._tries])
            self._tries += 1
            began = self.clock()
            try:
                engine = await self._begin()
            except Exception as error:
                logger.exception(
                    "the engine did not start", extra={"fields": {"try": self._tries, "cause": type(error).__name__}}
                )
                continue
            fields = {"engine": engine.pid, "try": self._tries, "seconds": round(self.clock() - began, 2)}
            logger.info("engine restarted", extra={"fields": fields})
            return engine
        return None

    async def _begin(self) -> RemoteEngine:
        """A process that runs. Raises whatever keeps it from that; nothing is left running then."""
        process = self._starting = self._spawn(self._start)
        try:
            alarm = asyncio.get_running_loop().call_later(self._patience, process.kill)
            try:
                facts = await asyncio.to_thread(process.ready)
            finally:
                alarm.cancel()
            if _lasting(facts) != _lasting(self._facts):
                raise ValueError("the model's folder has changed")
            engine = RemoteEngine(process, facts)
            engine.observer = self._observer
            await engine.attach()
        except BaseException:
            process.kill()
            raise
        finally:
            self._starting = None
        return engine


def _lasting(facts: Facts) -> Facts:
    """What must be the same of every process."""
    return facts._replace(rate=0, cost={}, cost_from="", adapters=())
