"""Text to train on: what neither calibrates nor evaluates, of the standard library; the calibration side of any other source."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .buckets import CALIBRATION, HELD_OUT
from .bundled import MAX_FILE_BYTES, UNSEEN, is_program, python_files, stdlib
from .document import Document
from .near_copies import without_near_copies
from .splits import split_documents
from .text import read_documents

ONE_IN = 4  # shingles that are compared: the standard library is large


class TokenStreams(NamedTuple):
    """train and held [n]: ids of the two sides, document after document. documents: SHA-256 of those trained on; bytes: their size."""

    train: Tensor
    held: Tensor
    documents: tuple[str, ...]
    bytes: int


def training_documents(source: str) -> list[Document]:
    """What of a source is trained on. UsageError for text that is shipped to measure with."""
    if source == "stdlib":
        return _programs()
    if source in UNSEEN:
        raise UsageError(
            f"'{source}' is text that nothing is trained on", "give stdlib, topics, a text file or a folder of your own"
        )
    return split_documents(read_documents(source), "calibration", source=source)


@cache
def _programs() -> list[Document]:
    """Programs of the standard library without a near-copy among those that calibrate and evaluate."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(python_files(root)):
        if not 200 <= path.stat().st_size <= MAX_FILE_BYTES:
            continue
        document = Document(path.relative_to(root).as_posix(), path.read_text("utf-8", errors="replace"))
        if document.bucket not in (HELD_OUT, CALIBRATION) and is_program(document.text):
            found.append(document)
    return without_near_copies(found, protected=stdlib(), one_in=ONE_IN)


def token_streams(tokenizer: Any, sources: Sequence[str], *, tokens: int | None, seed: int, least: int) -> TokenStreams:
    """Ids of both sides of all sources, each document opened by the tokenizer's mark; documents in an order that the seed gives.

    tokens: at most so many to train on, of whole documents; least: UsageError with fewer on a side. Deterministic.
    """
    train = [d for source in sources for d in training_documents(source)]
    held = [d for source in sources for d in split_documents(read_documents(source), "evaluation", source=source)]
    known = {d.sha256 for d in held}
    train = [d for d in {d.sha256: d for d in train}.values() if d.sha256 not in known]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = []
    used: list[Document] = []
    for i in order:
        if tokens is not None and len(ids) >= tokens:
            break
        ids += _encoded(tokenizer, train[i], mark)
        used.append(train[i])
    judged = [token for d in held for token in _encoded(tokenizer, d, mark)]
    for side, found in (("train on", ids), ("judge by", judged)):
        if len(found) < least:
            raise UsageError(
                f"the text has {len(found)} tokens to {side}, less than {least}", f"give more text than {', '.join(sources)}"
            )
    size = sum(len(d.text.encode()) for d in used)
    return TokenStreams(
        torch.tensor(ids, dtype=torch.int32), torch.tensor(judged, dtype=torch.int32), tuple(d.sha256 for d in used), size
    )


def _encoded(tokenizer: Any, document: Document, mark: int | None) -> list[int]:
    found: list[int] = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return found if mark is None else [mark, *found]
