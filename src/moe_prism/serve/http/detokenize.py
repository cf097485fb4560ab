"""Tokens to text as they come, and stop strings that may span tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class Detokenizer:
    """Text of a growing token sequence: a piece is given out once it can no longer change."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0  # a tokenizer may treat a first token differently, so one earlier piece is decoded with it

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def push(self, token: int) -> str:
        """New text after this token, perhaps empty."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith(HALF) or len(text) < len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What was held back, at the end."""
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]


class Stops:
    """Cuts text at the first stop string; holds back what might be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = list(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that may be shown. After `found`, nothing more."""
        if self.found:
            return ""
        self._held += text
        at = min((i for i in (self._held.find(s) for s in self.stops) if i >= 0), default=-1)
        if at >= 0:
            self.found = True
            out, self._held = self._held[:at], ""
            return out
        keep = self._tail()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def rest(self) -> str:
        out, self._held = self._held, ""
        return "" if self.found else out

    def _tail(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) - 1 for s in self.stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self.stops if len(s) > size):
                return size
        return 0


def token_text(tokenizer: Any, token: int) -> str:
    """A token on its own; its vocabulary entry where it is no whole text, so that different tokens stay different."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if HALF in text or not text else text
