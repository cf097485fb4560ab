"""Rows of JSON: one object per line, an array of objects, or objects one after the other; a row in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..errors import CorruptError, UsageError
from .stream import ROW_CHARACTERS, Characters

LONG = f"rows of more than {ROW_CHARACTERS >> 20} Mi characters"
_GAP = re.compile(r"[ \t\r\n]*")


def json_lines(characters: Characters) -> Iterator[tuple[int, Any]]:
    """(line, value). Raises CorruptError at a line that is not JSON."""
    for number, line in characters.lines():
        if line is None:
            characters.tally.leave_out(LONG, f"{characters.name}:{number}")
        elif line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _broken(f"{characters.path}:{number}", error) from error


def json_values(characters: Characters) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of an array's elements, or of values one after the other."""
    text = _Ahead(characters)
    is_array = text.take("[")
    number = 0
    while not text.take("]") if is_array else not text.at_end():
        if number and is_array and not text.take(","):
            if text.at_end() and characters.is_cut:
                return
            raise _broken(f"{characters.path}, after element {number}", "a comma is missing")
        value = text.value(number + 1)
        if value is _CUT:
            return
        number += 1
        yield number, value


_CUT = object()


class _Ahead:
    """A place in the characters, and as much of what follows as a value needs."""

    def __init__(self, characters: Characters) -> None:
        self._characters, self._chunks = characters, iter(characters)
        self._decoder = json.JSONDecoder()
        self._held, self._at, self._ended = "", 0, False

    def _more(self, wanted: int = 1) -> None:
        """Hold at least so many more characters, unless they end."""
        parts, have = [self._held[self._at :]], 0
        while have < wanted and not self._ended:
            part = next(self._chunks, None)
            self._ended = part is None
            parts.append(part or "")
            have += len(part or "")
        self._held, self._at = "".join(parts), 0

    def at_end(self) -> bool:
        """After white space, nothing follows."""
        while True:
            match = _GAP.match(self._held, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._held) or self._ended:
                return self._at >= len(self._held)
            self._more()

    def take(self, sign: str) -> bool:
        """Whether the next character is this one; it is then behind us."""
        if self.at_end() or self._held[self._at] != sign:
            return False
        self._at += 1
        return True

    def value(self, number: int) -> Any:
        """The next value; _CUT if the allowance ended within it."""
        where = f"{self._characters.path}, element {number}"
        self.at_end()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._held, self._at)
            except (ValueError, RecursionError) as error:
                if self._ended and self._characters.is_cut:
                    return _CUT
                if self._ended or isinstance(error, RecursionError):
                    raise _broken(where, error) from error
                if len(self._held) - self._at > ROW_CHARACTERS:
                    raise UsageError(
                        f"{where} is broken, or longer than {ROW_CHARACTERS >> 20} Mi characters",
                        "write one row per line, as .jsonl",
                    ) from error
                self._more(len(self._held) - self._at)  # twice as much, so that a long value is not read again and again
            else:
                return value


def _broken(where: str, error: object) -> CorruptError:
    return CorruptError(f"{where} is not JSON: {error}", "fix or remove it")
