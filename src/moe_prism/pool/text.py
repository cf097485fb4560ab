"""A text as a vector: counts of its words and of its three-letter pieces, hashed. Cheap, without a model, the same on every machine."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import numpy as np

from .base import Floats

SIZE = 512
LONGEST = 1 << 14
"""Characters that are looked at, from the end: what is asked mostly stands there."""
_WORD = re.compile(r"[^\W\d_]{2,}")


def words(text: str) -> list[str]:
    """Its words of two letters and more, lowered, in order."""
    return [word.lower() for word in _WORD.findall(text[-LONGEST:])]


def embed(text: str, size: int = SIZE) -> Floats:
    """[size] of length 1; zeros for a text without a character."""
    text = text[-LONGEST:]
    found = np.zeros(size)
    pieces = [*(f"w{word}" for word in words(text)), *(text[i : i + 3] for i in range(max(0, len(text) - 2)))]
    for piece in pieces or [text] * bool(text):
        found[zlib.crc32(piece.encode("utf-8", "replace")) % size] += 1
    found = np.log1p(found)
    length = float(np.linalg.norm(found))
    return found / length if length else found


def embed_all(texts: Iterable[str], size: int = SIZE) -> Floats:
    """[T, size]."""
    rows = [embed(text, size) for text in texts]
    return np.stack(rows) if rows else np.zeros((0, size))
