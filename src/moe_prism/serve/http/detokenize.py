"""Tokens to text as they come, where each of them begins in it, and stop strings that may span tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .vocabulary import Vocabulary

HALF = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class Shown(NamedTuple):
    """What one token did. text: what can no longer change; offset: characters of the text before the one that holds its first byte;
    data: its bytes, empty where it does not show.
    """

    text: str
    offset: int
    data: bytes


class Detokenizer(Protocol):
    """Text of a growing token sequence: a piece is given out once it can no longer change."""

    characters: int
    """Of the text that was given out."""

    def push(self, token: int) -> Shown: ...

    def rest(self) -> str:
        """What was held back, at the end."""


def detokenizer(vocabulary: Vocabulary, before: Sequence[int], *, hide: bool) -> Detokenizer:
    """For what comes after the tokens `before`. hide: special tokens do not show."""
    return _Joined(vocabulary, before, hide) if vocabulary.exact else _Decoded(vocabulary, before, hide)


class _Joined:
    """For tokenizers whose tokens are bytes that are joined."""

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int], hide: bool) -> None:
        self._vocabulary = vocabulary
        self._hidden = vocabulary.special if hide else frozenset[int]()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self.characters = 0
        self._strip = vocabulary.strips and all(token in vocabulary.special for token in before)

    def push(self, token: int) -> Shown:
        data = b"" if token in self._hidden else self._vocabulary.piece(token).data
        if self._strip and data:
            data = data[1:] if data.startswith(b" ") else data
            self._strip = False
        if not data:
            return Shown("", self.characters, data)
        held, _ = self._bytes.getstate()
        # as the end would decode it: the decoder holds b"\xed\xa0" back, though no third byte makes one character of it
        offset = self.characters + len((held + data[:1]).decode("utf-8", "replace")) - 1
        text = self._bytes.decode(data)
        self.characters += len(text)
        return Shown(text, offset, data)

    def rest(self) -> str:
        text = self._bytes.decode(b"", final=True)
        self.characters += len(text)
        return text


class _Decoded:
    """For the others: an earlier piece is decoded with the new one, since a tokenizer may treat a first token differently."""

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int], hide: bool) -> None:
        self._vocabulary, self._hide = vocabulary, hide
        self._ids = list(before[-6:])
        self._start, self._read = 0, len(self._ids)
        self.characters = 0

    def _decode(self, ids: list[int]) -> str:
        return str(self._vocabulary.tokenizer.decode(ids, skip_special_tokens=self._hide, clean_up_tokenization_spaces=False))

    def push(self, token: int) -> Shown:
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        offset = self.characters
        if text.endswith(HALF) or len(text) <= len(before):
            return Shown("", offset, b"")
        self._start, self._read = self._read, len(self._ids)
        self.characters += len(text) - len(before)
        return Shown(text[len(before) :], offset, text[len(before) :].encode())

    def rest(self) -> str:
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]


class Stops:
    """Cuts text at the first stop string; holds back what might be the beginning of one."""

    def __init__(self, stops: Sequence[str], *, show: bool = False) -> None:
        """show: the string that was found stays in the text."""
        self.stops, self._show = list(stops), show
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Text that may be shown. After `found`, nothing more."""
        if self.found is not None:
            return ""
        self._held += text
        places = [(at, s) for s in self.stops if (at := self._held.find(s)) >= 0]
        if places:
            at, self.found = min(places, key=lambda place: place[0])
            out, self._held = self._held[: at + (len(self.found) if self._show else 0)], ""
            return out
        keep = self._tail()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def rest(self) -> str:
        out, self._held = self._held, ""
        return "" if self.found is not None else out

    def _tail(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) - 1 for s in self.stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self.stops if len(s) > size):
                return size
        return 0
