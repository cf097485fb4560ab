"""Work in small steps, as a generator: whoever runs it may do something else between two of them."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def ended(steps: Generator[None, None, T]) -> T:
    """Run to the end: what is returned there."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            made: T = stop.value
            return made
