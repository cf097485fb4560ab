"""Who may wait: bounds on the queue in requests and tokens, reserved at the door and given back exactly once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...schedule.classes import RequestClass
from ..config import Config
from .guard import App
from .refusal import Refusal


@dataclass
class Place:
    """A reservation. `leave` may be called any number of times."""

    door: Door
    requests: int
    tokens: int
    left: bool = field(default=False)

    def settle(self, tokens: int, kind: RequestClass) -> None:
        """The prompts are counted now. Refuses where they are too many beside those of others."""
        self.door.more(tokens - self.tokens, kind, self.tokens)
        self.tokens = tokens

    def leave(self) -> None:
        """Give the place back; once, however often it is called."""
        if not self.left:
            self.left = True
            self.door.requests -= self.requests
            self.door.tokens -= self.tokens


class Door:
    """Counts sequences that are in the house, waiting or running. Only touched from the event loop, so a check and its reservation
    cannot be separated.
    """

    def __init__(self, config: Config, rate: float, refused: Callable[[str], None]) -> None:
        """rate: prompt tokens per second that this machine can prefill; refused: told the reason of every refusal."""
        self.config, self.rate, self._refused = config, rate, refused
        self.requests = self.tokens = 0
        self.leaving = False  # routers shall look elsewhere
        self.draining = False  # nobody new comes in
        shortest = min((c.ttft for c in config.classes.values() if c.ttft), default=None)
        self.bound_requests = config.engine.requests + config.queue_requests
        self.bound_tokens = config.bounds.queue_tokens or self._prefilled_in_time(shortest, rate)
        self._first = min(c.priority for c in config.classes.values())

    def _prefilled_in_time(self, shortest: float | None, rate: float) -> float:
        """Prompt tokens that may wait. Where no class has a target nobody is late, and only the number of requests is bounded."""
        return math.inf if shortest is None else max(4 * self.config.engine.step_tokens, 4096, math.ceil(4 * shortest * rate))

    def check_open(self) -> None:
        """Before a body is read: 503 while draining, or when not even the reserved places are free. The guard counts it."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="draining", retry=5)
        if self.requests >= self.bound_requests:
            raise Refusal(503, "the server is full", code="queue_requests", retry=self._retry())

    def enter(self, requests: int, tokens: int, kind: RequestClass) -> Place:
        """Reserve, or refuse: with 503, or with 400 where waiting would not help. Classes behind the first leave a share of the queue
        to it.
        """
        share = self._share(kind)
        if self.draining:
            raise self._refuse("draining", "the server is shutting down", 5)
        most = self.config.engine.requests + int(self.config.queue_requests * share)
        if requests > most:
            held = f"class '{kind.name}' may hold {most} (bounds.queue_requests)"
            raise Refusal(400, f"n x prompts is {requests}, {held}; send fewer in one request", param="n")
        if self.requests + requests > most:
            raise self._refuse("queue_requests", "the server is full", self._retry())
        self._check_tokens(self.tokens, tokens, share)
        self.requests += requests
        self.tokens += tokens
        return Place(self, requests, tokens)

    def more(self, tokens: int, kind: RequestClass, held: int) -> None:
        """Somebody who has a place, with tokens `held`, needs room for so many more."""
        self._check_tokens(self.tokens - held, held + tokens, self._share(kind))
        self.tokens += tokens

    def _share(self, kind: RequestClass) -> float:
        return 1.0 if kind.priority <= self._first else 1.0 - self.config.bounds.reserved

    def _check_tokens(self, others: int, tokens: int, share: float) -> None:
        if others and others + tokens > self.bound_tokens * share:
            raise self._refuse("queue_tokens", "too many prompt tokens are waiting", self._retry())

    def _retry(self) -> int:
        return max(1, min(60, math.ceil(self.tokens / max(self.rate, 1.0))))

    def _refuse(self, reason: str, message: str, retry: int) -> Refusal:
        self._refused(reason)
        return Refusal(503, message, code=reason, retry=retry)


class Openable(Protocol):
    """What refuses requests before they are looked at."""

    def check_open(self) -> None:
        """Refusal where nobody new comes in."""


class AtTheDoor:
    """Refuses generating requests before their body is read, while that is cheap."""

    def __init__(self, app: App, door: Openable) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].startswith("/v1/"):
            self.door.check_open()
        await self.app(scope, receive, send)
