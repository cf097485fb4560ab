"""Who is inside: as many requests as all upstreams together may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..http.refusal import Refusal


@dataclass
class Seat:
    """A reservation. `leave` may be called any number of times."""

    turnstile: Turnstile
    left: bool = False

    def leave(self) -> None:
        """Give it back, once."""
        if not self.left:
            self.left = True
            self.turnstile.requests -= 1


class Turnstile:
    """Only touched from the event loop."""

    def __init__(self, most: int, refused: Callable[[str], None]) -> None:
        """most: requests; refused: told the reason of every refusal after the guard."""
        self.most, self._refused = most, refused
        self.requests = 0
        self.leaving = self.draining = False

    def check_open(self) -> None:
        """Before a body is read; the guard counts what is refused here."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="draining", retry=5)
        if self.requests >= self.most:
            raise Refusal(503, "all upstreams are full", code="queue_requests", retry=1)

    def enter(self) -> Seat:
        """A place, or 503."""
        try:
            self.check_open()
        except Refusal as refusal:
            self._refused(refusal.code)
            raise
        self.requests += 1
        return Seat(self)
