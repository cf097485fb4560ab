"""From a request to an answer: one upstream after the other until the first byte, then the answer as it comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
from fastapi import Request
from fastapi.responses import Response

from ..http.answers import event
from ..http.client_stream import ClientStream
from ..http.refusal import Refusal
from .metrics import RouteMetrics
from .options import Choice, PoolOptions, RequestLimits
from .request import RouteRequest
from .turnstile import Seat, Turnstile
from .upstream import Arrived, NoAnswer, Refused, error_body

logger = logging.getLogger("moe_prism.requests")
T = TypeVar("T")
LOOK = 0.05
"""Seconds between looks whether a waiting client is still there."""


class Left(Exception):
    """The client is gone."""


@dataclass
class Trip:
    """One request on its way. tried: upstreams that gave no answer, and why; sent: to how many it was sent; choice: who answers.

    first: seconds to the answer.
    """

    options: PoolOptions
    metrics: RouteMetrics
    place: Seat
    http: Request
    path: str
    asked: RouteRequest
    wanted: RequestLimits
    until: float
    began: float = field(default_factory=time.monotonic)
    tried: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    choice: Choice | None = None
    first: float = 0.0
    retry: int | None = None
    is_closed: bool = False

    async def run(self) -> Response:
        """Raises a Refusal where no upstream answers; gives its place back unless a stream goes on."""
        goes_on = False
        try:
            arrived, ignored = await self._first()
            headers = {**arrived.headers, "x-moe-prism-upstream": self.answering.option.name}
            if ignored:
                headers["x-moe-prism-ignored"] = ",".join(filter(None, [headers.get("x-moe-prism-ignored"), *ignored]))
            if isinstance(arrived, WholeAnswer):
                return Response(arrived.body, media_type="application/json", headers=headers)
            goes_on = True
            return Passed(self, arrived, {**headers, "cache-control": "no-cache"})
        except Refused as refused:
            self.close("refused")
            return Response(refused.body, refused.status, media_type="application/json")
        except Left:
            self.close("disconnect")
            return Response(status_code=499)
        finally:
            if not goes_on:
                self.close("error" if self.choice is None else "stop")

    @property
    def answering(self) -> Choice:
        """Who answers, once somebody does."""
        assert self.choice is not None
        return self.choice

    async def _first(self) -> tuple[Arrived | WholeAnswer, list[str]]:
        bounds = self.options.pool.form.bounds
        order = self.options.order(self.asked.text(), self.wanted)
        for choice in order:
            name = choice.option.model
            if name in self.tried or self.sent >= bounds.tries:
                continue
            if choice.upstream.is_full:
                self.tried[name] = "full"
                continue
            body, ignored = self.asked.body(choice)
            self.sent += 1
            try:
                return await self._ask(choice, body), ignored
            except NoAnswer as failed:
                self.tried[name] = failed.reason
                self.retry = failed.retry if self.retry is None else min(self.retry, failed.retry or self.retry)
                self.metrics.fail(name)
            if asyncio.get_running_loop().time() >= self.until:
                raise Refusal(504, "no upstream answered in time (bounds.request_seconds)")
        if not order:
            raise Refusal(503, "no model that meets the limits of the request is up", code="upstreams", retry=self._soon())
        told = "; ".join(f"{name}: {why}" for name, why in self.tried.items())
        raise Refusal(503, f"no upstream answered ({told})"[:500], code="upstreams", retry=self.retry or self._soon())

    def _soon(self) -> int:
        """Seconds after which upstreams have been looked at again."""
        return max(1, round(self.options.pool.form.bounds.probe_seconds))

    async def _ask(self, choice: Choice, body: bytes) -> Arrived | WholeAnswer:
        """The upstream counts the request until it has answered, or until its stream ends."""
        upstream, passed = choice.upstream, self.http.scope.get("moe_prism_passed_on", {})
        headers = {
            wire: passed[name]
            for name, wire in (("request_id", "x-request-id"), ("traceparent", "traceparent"))
            if name in passed
        }
        upstream.running += 1
        goes_on = False
        try:
            sent = time.monotonic()
            arrived = await self._beside(upstream.open(self.path, body, headers, self.until))
            first = time.monotonic() - sent
            if not self.asked.stream:
                whole = WholeAnswer(await self._beside(upstream.whole(arrived, self.until)), arrived.headers)
                self.choice = choice
                self.metrics.answer(upstream.form.name, first)
                return whole
            self.choice, self.first, goes_on = choice, first, True
            self.metrics.answer(upstream.form.name, first)
            return arrived
        finally:
            if not goes_on:
                upstream.running -= 1

    async def _beside(self, work: Awaitable[T]) -> T:
        """The work, unless the client leaves first."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=LOOK)
                if not task.done() and await self.http.is_disconnected():
                    raise Left
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
            elif not task.cancelled():
                task.exception()

    def close(self, end: str) -> None:
        """Give the place back and write the log line, once; the text is not in it."""
        if self.is_closed:
            return
        self.is_closed = True
        self.place.leave()
        self.metrics.end(end)
        fields: dict[str, Any] = {**self.http.scope.get("moe_prism_passed_on", {}), "end": end, "tried": self.tried}
        if self.choice is not None:
            fields["upstream"] = self.choice.option.name
        logger.info("request", extra={"fields": {**fields, "seconds": round(time.monotonic() - self.began, 4)}})


@dataclass(frozen=True)
class WholeAnswer:
    """An answer in one piece."""

    body: bytes
    headers: Mapping[str, str]


class Passed(ClientStream):
    """An upstream's stream, byte by byte. Gives everything back whichever way it ends."""

    def __init__(self, trip: Trip, arrived: Arrived, headers: dict[str, str]) -> None:
        self._trip, self._arrived = trip, arrived
        self._parts = _parts(trip, arrived)
        super().__init__(self._parts, media_type=arrived.kind, headers=headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._parts.aclose()
            await self._arrived.close()
            self._trip.answering.upstream.running -= 1
            self._trip.close("disconnect")


async def _parts(trip: Trip, arrived: Arrived) -> AsyncGenerator[bytes, None]:
    """What comes, within the bounds on time and bytes. A stream that its upstream ends early says so in an event of its own."""
    bounds, loop = trip.options.pool.form.bounds, asyncio.get_running_loop()
    left, parts, began = bounds.answer_bytes - len(arrived.first), 0, loop.time()
    why = "its answer is too large" if left < 0 else ""
    if not why:
        yield arrived.first
    rest = aiter(arrived.rest)
    while not why:
        try:
            async with asyncio.timeout_at(min(trip.until, loop.time() + bounds.idle_seconds)):
                part = await anext(rest, None)
        except TimeoutError:
            why = "it took too long"
        except httpx2.HTTPError:
            why = "its connection broke"
        else:
            if part is None:
                break
            left, parts = left - len(part), parts + 1
            why = "its answer is too large" if left < 0 else ""
            if not why:
                yield part
    if why:
        trip.metrics.fail(trip.answering.option.model)
        yield event(error_body(f"the upstream ended early: {why}"))
        trip.close("error")
        return
    trip.answering.times.note(trip.first, (loop.time() - began) / parts if parts else None)
    trip.close("stop")


def start(options: PoolOptions, metrics: RouteMetrics, door: Turnstile, http: Request, path: str, asked: RouteRequest) -> Trip:
    """Reserve a place for a request whose limits are understood. Refusal where there is none."""
    wanted = asked.wanted(options.pool.form.name, options.upstreams)
    options.allowed(wanted)
    until = asyncio.get_running_loop().time() + options.pool.form.bounds.request_seconds
    return Trip(options, metrics, door.enter(), http, path, asked, wanted, until)
