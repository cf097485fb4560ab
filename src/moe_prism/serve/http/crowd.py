"""Who is connected: how many connections there may be, of all clients and of one, and who goes where there are too many."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..config import HttpBounds


PACE, BURST = 10.0, 16.0
"""New connections of one address, a second and at once, where there are many already; a request that is complete gives its own back. One
costs a third of a millisecond, and attackers open thousands."""
GUESTS = 16
"""Connections beyond the bound that are heard all the same, of those who ask how the server is: it is asked most when it is full."""
TURN, LET_IN = 0.01, 16
"""Seconds of one turn of the event loop for new connections that are closed unheard, and how many are let in."""
AWAY = struct.pack("ii", 1, 0)
"""For SO_LINGER: a connection that is closed is forgotten at once."""


class Client(Protocol):
    """What a crowd asks of a connection."""

    def drop(self) -> None:
        """Close it now."""


class Crowd:
    """Connections by the address of their client. Those that wait for bytes of a request are known in the order in which they began to.

    While somebody waits there is room for a new one: who has been sending one request for longest goes, of the newcomer's own address first
    where that has its share of all places. A client that sends what it has to say at once is never the one. Where there are many, an
    address opens only so many a second.
    """

    def __init__(self, bounds: HttpBounds, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = bounds.connections
        self.most_of_one = min(self.most, bounds.connections_per_client or max(1, self.most * 3 // 4))
        self._of: dict[str, dict[Client, bool]] = {}  # address -> connection -> whether it waits
        self._waiting: dict[Client, str] = {}  # oldest first
        self.count = self.guests = 0
        self._clock = clock
        self._paces: dict[str, tuple[float, float]] = {}  # address -> connections it may still open now, since when

    def hears(self, address: str) -> bool:
        """Whether a new connection is worth the work of making it one. Cheap: asked before anything else is done for it."""
        if self.count < self.most_of_one:
            self._paces.clear()
            return True
        now = self._clock()
        left, then = self._paces.get(address, (BURST, now))
        left = min(BURST, left + (now - then) * PACE)
        self._paces[address] = (left - (left >= 1), now)
        return left >= 1

    def _share(self, address: str) -> int:
        return min(self.most_of_one, self.most // (len(self._of) + (address not in self._of)))

    def enter(self, connection: Client, address: str) -> bool:
        """Whether it may stay; another one may have to go for it."""
        held = len(self._of.get(address, ()))
        if held >= self.most_of_one and not self._make_room(address):
            return False
        if self.count >= self.most:
            own = held >= self._share(address) and self._make_room(address)
            if not own and not self._make_room(None):
                return False
        self._of.setdefault(address, {})[connection] = True
        self._waiting[connection] = address
        self.count += 1
        return True

    def take_guest(self) -> bool:
        """Whether one that may not stay is heard for one question. Who was taken has to `part`."""
        if self.guests >= GUESTS:
            return False
        self.guests += 1
        return True

    def part(self) -> None:
        """A guest is gone."""
        self.guests -= 1

    def wait(self, connection: Client, address: str) -> None:
        """It waits for the next request of its client from now on."""
        if connection in self._of.get(address, {}):
            self._waiting.pop(connection, None)
            self._waiting[connection] = address

    def work(self, connection: Client) -> None:
        """Its request is complete."""
        address = self._waiting.pop(connection, None)
        if address in self._paces:
            left, then = self._paces[address]
            self._paces[address] = (left + 1, then)

    def leave(self, connection: Client, address: str) -> None:
        """It is closed; harmless if it was not in."""
        mine = self._of.get(address, {})
        if mine.pop(connection, None) is not None:
            self.count -= 1
        if not mine:
            self._of.pop(address, None)
        self._waiting.pop(connection, None)

    def _make_room(self, address: str | None) -> bool:
        """Drop the one that has waited longest, of an address or of all."""
        for connection, of in self._waiting.items():
            if address in (None, of):
                self.leave(connection, of)
                connection.drop()
                return True
        return False


class Doorway(socket.socket):
    """A listening socket that closes, unheard, what a crowd does not hear, and lets the event loop go on after some of them."""

    crowd: Crowd | None = None
    _until, _left = 0.0, LET_IN

    def accept(self) -> tuple[socket.socket, Any]:
        self._until = self._until or time.monotonic() + TURN
        while self._left and time.monotonic() < self._until:
            try:
                link, address = super().accept()
            except BlockingIOError:  # nobody is there
                break
            if self.crowd is None or self.crowd.hears(address[0]):
                self._left -= 1
                return link, address
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AWAY)
            link.close()
        self._until, self._left = 0.0, LET_IN
        raise BlockingIOError
