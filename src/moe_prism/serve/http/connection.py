"""What uvicorn's connections have not: absolute deadlines for what a client sends, a bound on their number, and errors in JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..config import HttpBounds
from .crowd import Crowd
from .refusal import Refusal

LINGER = 1.0
"""Seconds that the rest of a body may still come in, unread, after its answer: a client that is sending would not see the answer if the
connection were closed under it."""
GRACE = 1.0
"""Seconds after the deadline of a body in which its route may still answer 408 by itself."""


PROBES = frozenset({b"/health", b"/ready", b"/metrics"})
"""What is answered beyond the bound of connections, once on a connection: balancers and whoever looks after the server ask these."""
ASK = 1.0
"""Seconds in which such a question must be complete."""
FULL = Refusal(503, "too many connections (bounds.connections)", code="connections", retry=1)


class Paced(H11Protocol):  # type: ignore[misc]
    """One connection within `bounds`, among those of `crowd`."""

    bounds: HttpBounds
    crowd: Crowd
    _alarm: asyncio.TimerHandle | None = None
    _part = ""  # of a request, that the alarm is for
    _address = ""
    _guest = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._head = bytearray()
        self._address = self.client[0] if self.client else ""
        if self.crowd.enter(self, self._address):
            self._expect("header", self.bounds.header_seconds)
        elif self.crowd.take_guest():
            self._guest = True
            self._expect("header", ASK)
        else:
            self._say(FULL)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        whole = self._whole_head(data)
        if whole:
            super().data_received(whole)
        self._look(came=True)

    def _whole_head(self, data: bytes) -> bytes:
        """What the parser is to see of what came: a head once it ends, for that takes it long, and attackers send theirs byte by byte."""
        if self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
            return data
        seen = max(0, len(self._head) - 2)
        self._head += data
        ends = self._head.find(b"\n\r\n", seen) >= 0 or self._head.find(b"\n\n", seen) >= 0
        if not ends and self._head[0] > 0x20 and len(self._head) <= self.bounds.header_bytes:
            return b""
        whole, self._head = bytes(self._head), bytearray()
        if self._guest and not _is_probe(whole):
            self._say(FULL)
            return b""
        return whole

    def on_response_complete(self) -> None:
        """The response is sent: what is left of the body has its own time."""
        super().on_response_complete()
        if self._guest:
            self.transport.close()
        elif self.conn.their_state is h11.SEND_BODY:
            self._expect("rest", LINGER)
        else:
            self._look(came=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._guest:
            self.crowd.part()
        self.crowd.leave(self, self._address)
        super().connection_lost(exc)

    def _look(self, *, came: bool) -> None:
        """Where the client is in its request. came: it has just sent something."""
        state = self.conn.their_state
        if state is h11.IDLE:
            if self._part != "header":
                self._disarm()
                self.crowd.wait(self, self._address)
                if came:  # part of the next request; before that, uvicorn counts the time of an idle connection
                    self._expect("header", self.bounds.header_seconds)
        elif state is h11.SEND_BODY:
            if self._part not in ("body", "rest"):
                self._expect("body", self.bounds.body_seconds + GRACE)
        else:
            self._disarm()
            self.crowd.work(self)

    def _expect(self, part: str, seconds: float) -> None:
        self._disarm()
        self._part, self._alarm = part, self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        self._part = ""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _late(self) -> None:
        if self._guest and self._part == "header":
            self._say(FULL)
        elif not self.transport.is_closing():
            self.transport.abort()

    def drop(self) -> None:
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Bytes that are no HTTP."""
        self._say(Refusal(400, msg, code="invalid_request"))

    def _say(self, refusal: Refusal) -> None:
        """Answer without any request, and close."""
        body = json.dumps(refusal.body()).encode()
        said = {400: "Bad Request", 503: "Service Unavailable"}[refusal.status]
        head = [f"HTTP/1.1 {refusal.status} {said}", "content-type: application/json", f"content-length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in refusal.headers().items()]
        self.transport.write("\r\n".join([*head, "connection: close", "", ""]).encode() + body)
        self.transport.close()


def _is_probe(head: bytes) -> bool:
    """Whether a request's head asks one of `PROBES`, with or without a query."""
    method, _, rest = head.lstrip().partition(b" ")
    return method in (b"GET", b"HEAD") and rest.split(b" ", 1)[0].split(b"?", 1)[0] in PROBES


def paced_protocol(bounds: HttpBounds) -> type[Paced]:
    """uvicorn's HTTP protocol within `bounds`: headers and body of every request have an absolute deadline, whoever reads them."""
    return type("PacedHere", (Paced,), {"bounds": bounds, "crowd": Crowd(bounds)})
