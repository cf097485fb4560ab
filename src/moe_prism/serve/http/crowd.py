"""Who is connected: how many connections there may be, of all clients and of one, and who goes where there are too many."""

from __future__ import annotations

from typing import Protocol

from ..config import Bounds


class Client(Protocol):
    """What a crowd asks of a connection."""

    def drop(self) -> None:
        """Close it now."""


class Crowd:
    """Connections by the address of their client. Those that wait for bytes of a request are known in the order in which they began to.

    A new connection is always let in while somebody waits: who has been sending one request for longest goes. A client that sends what it
    has to say at once is never the one.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.most = bounds.connections
        self.most_of_one = min(self.most, bounds.connections_per_client or max(1, self.most * 3 // 4))
        self._of: dict[str, dict[Client, bool]] = {}  # address -> connection -> whether it waits
        self._waiting: dict[Client, str] = {}  # oldest first
        self.count = 0

    def enter(self, connection: Client, address: str) -> bool:
        """Whether it may stay; another one may have to go for it."""
        if len(self._of.get(address, ())) >= self.most_of_one and not self._make_room(address):
            return False
        if self.count >= self.most and not self._make_room(None):
            return False
        self._of.setdefault(address, {})[connection] = True
        self._waiting[connection] = address
        self.count += 1
        return True

    def wait(self, connection: Client, address: str) -> None:
        """It waits for the next request of its client from now on."""
        if connection in self._of.get(address, {}):
            self._waiting.pop(connection, None)
            self._waiting[connection] = address

    def work(self, connection: Client) -> None:
        """Its request is complete."""
        self._waiting.pop(connection, None)

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
