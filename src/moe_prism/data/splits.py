"""One rule decides on which side of the calibration/evaluation line a document falls: the MD5 of a file's base name, or of what a row says.

The rule looks at nothing else, so the same source gives the same two sides in every command, and vendored copies of one file
land together, as equal rows do. A text that stands on both sides by two names calibrates. prism-nano was trained on neither side of
the standard library (recipes/nano uses the same buckets).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..errors import UsageError
from ..options.text import FORMS
from .buckets import BUCKETS, CALIBRATION, HELD_OUT
from .bundled import BUNDLED, UNSEEN
from .document import Document

Side = Literal["calibration", "evaluation"]
EVALUATION_SHARE = 0.2


def split_documents(documents: Sequence[Document], side: Side, *, source: str) -> list[Document]:
    """The documents of one side.

    The standard library and the shipped domains: bucket 1 calibrates, bucket 0 evaluates. Other sources: buckets 0-7 evaluate, the
    rest calibrate; where that leaves a side empty (one file, or few), every document is cut in two at 80 % of its length instead.
    Raises UsageError if there is no text at all.
    """
    if not any(d.text.strip() for d in documents):
        raise UsageError(f"text source '{source}' is empty", f"give {FORMS}, or one of {', '.join(BUNDLED)}")
    if source in UNSEEN:
        wanted = {CALIBRATION} if side == "calibration" else {HELD_OUT}
        return [d for d in documents if d.bucket in wanted]
    limit = int(BUCKETS * EVALUATION_SHARE)
    calibration = [d for d in documents if d.bucket >= limit]
    known = {d.sha256 for d in calibration}
    evaluation = [d for d in documents if d.bucket < limit and d.sha256 not in known]
    if calibration and evaluation:
        return evaluation if side == "evaluation" else calibration
    return [_part(d, side) for d in documents]


def _part(document: Document, side: Side) -> Document:
    cut = int(len(document.text) * (1 - EVALUATION_SHARE))
    text = document.text[cut:] if side == "evaluation" else document.text[:cut]
    return Document(f"{document.name}[{side}]", text, document.is_part)
