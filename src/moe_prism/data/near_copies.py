"""Near-copies of documents, found by shingles: runs of ten words that two documents share.

Equal bytes are not what makes text known: a vendored file with another header, or the same page of the next version, is as well
known. A document is a near-copy if much of it stands in one that is kept, or if much of a protected one stands in it.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from .document import Document

WORDS_PER_SHINGLE = 10
BOILERPLATE = 20  # a shingle of more documents than this is a licence header or an idiom, and tells nothing
NEAR = 0.3  # a document of which more than this share stands in kept ones is a near-copy
OWN = 0.2  # what has less of its own beside boilerplate is boilerplate
_WORD = re.compile(r"\w+")


def shingles(text: str) -> NDArray[np.uint64]:
    """The distinct hashes of all runs of ten words of a text, sorted. Empty for a shorter text."""
    words = np.fromiter((zlib.crc32(w.encode()) for w in _WORD.findall(text)), np.uint64)
    if len(words) < WORDS_PER_SHINGLE:
        return np.empty(0, np.uint64)
    runs = np.lib.stride_tricks.sliding_window_view(words, WORDS_PER_SHINGLE)
    factors = np.cumprod(np.full(WORDS_PER_SHINGLE, 0x9E3779B97F4A7C15, np.uint64))
    mixed = (runs * factors).sum(axis=1, dtype=np.uint64)
    return np.unique(mixed ^ (mixed >> np.uint64(31)))


def without_near_copies(
    documents: Iterable[Document], *, protected: Sequence[Document] = (), near: float = NEAR, one_in: int = 1
) -> list[Document]:
    """The documents, in their order, that are near-copies neither of a protected document nor of an earlier one that was kept.

    A protected document is also compared the other way round: what contains much of it is dropped, however long it is. A document
    that is boilerplate for the most part is dropped as well. `one_in` looks at a part of the shingles only, by their hash, for large
    collections. Deterministic; the time grows with the words.
    """
    candidates = list(documents)
    whole = [h[h % np.uint64(one_in) == 0] for h in (shingles(d.text) for d in [*protected, *candidates])]
    values, counts = np.unique(np.concatenate([*whole, np.empty(0, np.uint64)]), return_counts=True)
    common = values[counts > BOILERPLATE]
    marks = [np.setdiff1d(h, common, assume_unique=True).tolist() for h in whole]
    owners: dict[int, list[int]] = {}
    for index, mark in enumerate(marks[: len(protected)]):
        for h in mark:
            owners.setdefault(h, []).append(index)
    seen = set(owners)
    kept = []
    for position, document in enumerate(candidates, len(protected)):
        mark = marks[position]
        shared = Counter(owner for h in mark for owner in owners.get(h, ()))
        copied = sum(h in seen for h in mark) > near * len(mark) or any(n > near * len(marks[o]) for o, n in shared.items())
        if copied or len(mark) < OWN * len(whole[position]):
            continue
        seen.update(mark)
        kept.append(document)
    return kept
