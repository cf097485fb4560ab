"""The generator: sends every request when it is due and never waits for an answer."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import PrismError
from ..schedule.base import Job, Ladder
from ..schedule.workloads import Arrival
from .http import Broken, dial
from .measures import Lateness, Window
from .outcome import FAILED, OK, Outcome
from .prompts import Prompt
from .saturation import saturated
from .stream import Stream
from .target import Target

LEAD = 0.1  # seconds before a request is due that its connection is opened
Fields = Literal["none", "targets", "class"]


@dataclass(frozen=True)
class LoadRun:
    """A run and what is known about its making."""

    outcomes: list[Outcome]
    seconds: float  # over which requests were due
    client_cpu: float = 0.0  # share of a core that the generator used

    @property
    def lateness(self) -> Lateness:
        return Lateness.of(self.outcomes, self.seconds)

    @property
    def window(self) -> Window:
        return Window.steady(self.seconds)

    @property
    def saturated(self) -> bool:
        return saturated(self.outcomes, self.window)


def request_fields(job: Job, ladder: Ladder, fields: Fields) -> dict[str, Any]:
    """What a request says about its quality and targets."""
    if fields == "none":
        return {}
    levels = ladder.levels
    floor, ceiling = levels[job.floor].quality, levels[job.ceiling].quality
    said: dict[str, Any] = {"min_quality": floor, "quality": ceiling, "priority": job.priority}
    if fields == "class":
        said["class"] = job.kind
    for name, seconds in (("ttft_ms", job.ttft), ("tpot_ms", job.tpot)):
        if seconds is not None:
            said[name] = seconds * 1000
    return said


def bodies(target: Target, arrivals: Iterable[Arrival], prompts: Iterable[Prompt], fields: Fields) -> list[bytes]:
    """Whole requests, made before the run so that nothing is made in it. Greedy; the answer has as many tokens as the workload says."""
    made = []
    for arrival, prompt in zip(arrivals, prompts, strict=True):
        body = {
            "model": target.model,
            "prompt": prompt,
            "max_tokens": arrival.length,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **request_fields(arrival.job, target.ladder, fields),
        }
        made.append(target.address.request("POST", "/completions", target.key, json.dumps(body).encode()))
    return made


async def drive(
    target: Target, arrivals: Sequence[Arrival], requests: Sequence[bytes], seconds: float, patience: float
) -> LoadRun:
    """Send all; wait `patience` seconds after the last was due, then cut off what is unfinished. arrivals are in order."""
    loop = asyncio.get_running_loop()
    outcomes = [Outcome(a.job, a.length) for a in arrivals]
    tasks: set[asyncio.Task[None]] = set()
    with _undisturbed():
        began, cpu = time.perf_counter(), time.process_time()
        zero = loop.time() + LEAD
        for outcome, request in zip(outcomes, requests, strict=True):
            await _until(zero + outcome.job.arrival - LEAD)
            task = asyncio.create_task(_one(target, outcome, request, zero))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        waiting = list(tasks)
        if waiting:
            last = outcomes[-1].job.arrival
            _, late = await asyncio.wait(waiting, timeout=max(0.0, zero + last + patience - loop.time()))
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        share = (time.process_time() - cpu) / (time.perf_counter() - began)
    return LoadRun(outcomes, seconds, share)


async def _one(target: Target, outcome: Outcome, request: bytes, zero: float) -> None:
    loop = asyncio.get_running_loop()
    stream = Stream(outcome, zero)
    try:
        call = await dial(target.address, loop.time, stream.hear)
    except OSError as error:
        outcome.status, outcome.detail = FAILED, f"no connection: {error.strerror or error}"
        return
    try:
        await _until(zero + outcome.job.arrival)
        outcome.sent = call.send(request) - zero
        await call.finished
    except Broken as error:
        stream.close(call.reader, error)
    else:
        stream.close(call.reader)
    finally:
        call.close()


async def _until(moment: float) -> None:
    left = moment - asyncio.get_running_loop().time()
    if left > 0:
        await asyncio.sleep(left)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection: a pass over all objects would be measured as the server's."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


async def warm_up(target: Target, prompt: Prompt, tokens: int = 16, most: int = 12) -> dict[str, float | None]:
    """Single requests until three in a row agree within 5 %, at most twelve. Least TTFT and TPOT: those of an unloaded server, in seconds.

    PrismError if a request fails.
    """
    arrival = Arrival(Job("warm", 0.0, len(prompt), tokens, target.ladder.top, target.ladder.top), tokens)
    request = bodies(target, [arrival], [prompt], "none")
    seen: list[Outcome] = []
    while len(seen) < most and not _steady([o.e2e for o in seen if o.e2e is not None]):
        (outcome,) = (await drive(target, [arrival], request, 1.0, 120.0)).outcomes
        if outcome.status != OK:
            raise PrismError(
                f"{target.address.url} failed a first request: {outcome.detail or outcome.status}", "see the server's log"
            )
        seen.append(outcome)
    return {
        "ttft": min((o.ttft for o in seen if o.ttft is not None), default=None),
        "tpot": min((o.tpot for o in seen if o.tpot is not None), default=None),
    }


def _steady(times: Sequence[float]) -> bool:
    last = times[-3:]
    return len(last) == 3 and max(last) <= 1.05 * min(last)
