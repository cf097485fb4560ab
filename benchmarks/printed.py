"""Rows of a benchmark, shown as they are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def printed(rows: Iterable[dict[str, Any]], show: Callable[[dict[str, Any]], str], quiet: bool) -> list[dict[str, Any]]:
    """All rows, each shown on a line of its own as soon as it is there, unless `quiet`: then the caller prints them as JSON."""
    found = []
    for row in rows:
        found.append(row)
        if not quiet:
            print(show(row), flush=True)
    return found
