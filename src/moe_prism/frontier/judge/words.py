"""The words in a window of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

MARKS = ("\u0120", "\u2581")  # how byte-level and SentencePiece vocabularies write the blank before a word


class Word(NamedTuple):
    """tokens first..stop - 1 of a window; text without the blank before it."""

    first: int
    stop: int
    text: str


def words(tokenizer: Any, ids: Sequence[int]) -> list[Word]:
    """The whole words of ASCII letters that begin and end with a token."""
    pieces = [piece if isinstance(piece, str) else "" for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    found: list[Word] = []
    place = 0
    while place < len(pieces):
        first, text = place, _letters(pieces[place])
        place += 1
        begins = pieces[first].startswith(MARKS) or first == 0 or not pieces[first - 1][-1:].isalpha()
        if not text or not begins:
            continue
        while place < len(pieces) and not pieces[place].startswith(MARKS) and _letters(pieces[place]):
            text += pieces[place]
            place += 1
        open_ended = place == len(pieces) or (not pieces[place].startswith(MARKS) and pieces[place][:1].isalpha())
        if not open_ended:
            found.append(Word(first, place, text))
    return found


def _letters(piece: str) -> str:
    """The piece without its mark where that is letters and nothing else."""
    text = piece[1:] if piece.startswith(MARKS) else piece
    return text if text.isascii() and text.isalpha() else ""
