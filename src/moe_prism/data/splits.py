"""One rule decides on which side of the calibration/evaluation line a document falls: the MD5 of its base name.

The rule looks at nothing else, so the same source gives the same two sides in every command, and vendored copies of one file
land together. prism-nano was trained on neither side of the standard library (recipes/nano uses the same buckets).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import PurePath
from typing import Literal

from ..errors import UsageError
from .text import Document

BUCKETS = 40
Side = Literal["calibration", "evaluation"]
HELD_OUT, CALIBRATION = 0, 1  # the buckets prism-nano has not seen
EVALUATION_SHARE = 0.2


def bucket_of(name: str) -> int:
    """0..39 from the base name of a file."""
    base = PurePath(name).name
    return int(hashlib.md5(base.encode(), usedforsecurity=False).hexdigest(), 16) % BUCKETS


def split_documents(documents: Sequence[Document], side: Side, *, source: str) -> list[Document]:
    """The documents of one side.

    Standard library: bucket 1 calibrates, bucket 0 evaluates. Other sources: buckets 0-7 evaluate, the rest calibrate; where that
    leaves a side empty (one file, or few), every document is cut in two at 80 % of its length instead.
    Raises UsageError if there is no text at all.
    """
    if not any(d.text.strip() for d in documents):
        raise UsageError(
            f"text source '{source}' is empty", "give a text file, a folder of them, a .jsonl file, 'stdlib' or 'topics'"
        )
    if source == "stdlib":
        wanted = {CALIBRATION} if side == "calibration" else {HELD_OUT}
        return [d for d in documents if bucket_of(d.name) in wanted]
    limit = int(BUCKETS * EVALUATION_SHARE)
    evaluation = [d for d in documents if bucket_of(d.name) < limit]
    if 0 < len(evaluation) < len(documents):
        return evaluation if side == "evaluation" else [d for d in documents if bucket_of(d.name) >= limit]
    return [_part(d, side) for d in documents]


def _part(document: Document, side: Side) -> Document:
    cut = int(len(document.text) * (1 - EVALUATION_SHARE))
    text = document.text[cut:] if side == "evaluation" else document.text[:cut]
    return Document(f"{document.name}[{side}]", text)
