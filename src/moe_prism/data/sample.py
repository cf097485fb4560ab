"""A bounded, uniform part of any number of documents."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from ..tally import TextTally
from .document import Document


def bounded(documents: Iterable[Document], characters: int, tally: TextTally) -> list[Document]:
    """All documents in their order; of more than `characters` in all, those with the smallest hashes that fit, at least one.

    What is kept depends on nothing but the documents, and no more than that is ever held.
    """
    held: list[tuple[int, int, Document]] = []  # largest hash first
    total = dropped = 0
    for place, document in enumerate(documents):
        total += len(document.text)
        heapq.heappush(held, (-int(document.sha256, 16), place, document))
        while total > characters and len(held) > 1:
            total -= len(heapq.heappop(held)[2].text)
            dropped += 1
    if dropped:
        tally.remark(f"documents beyond {characters >> 20} Mi characters, not sampled", tally.source, dropped)
    return [document for _, _, document in sorted(held, key=lambda entry: entry[1])]
