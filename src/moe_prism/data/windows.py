"""Documents to token windows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .document import Document
from .splits import Side, split_documents
from .text import read_documents


@dataclass(frozen=True)
class Windows:
    """Token ids [n, length] and where they came from."""

    ids: Tensor
    source: str
    side: Side
    documents: tuple[str, ...]  # SHA-256 of each document used
    characters: int  # of all documents used

    @property
    def tokens(self) -> int:
        return self.ids.numel()


def token_windows(tokenizer: Any, source: str, side: Side, *, length: int, tokens: int, exclude: Sequence[str] = ()) -> Windows:
    """About `tokens` tokens of one side of a source, as windows [n, length] spread evenly over it.

    exclude: SHA-256 of documents that must not be used (the calibration text, when evaluating). Deterministic.
    Raises UsageError if fewer tokens than one window are left.
    """
    documents = [d for d in split_documents(read_documents(source), side, source=source) if d.sha256 not in set(exclude)]
    ids = _tokenise(tokenizer, documents)
    available = len(ids) // length
    if available < 1:
        raise UsageError(
            f"text source '{source}' has {len(ids)} tokens for {side}, less than one window of {length}",
            "give more text or a smaller --length",
        )
    count = min(available, max(1, tokens // length))
    # evenly spread, so that a part of a source is a sample of all of it
    starts = [(i * available // count) * length for i in range(count)]
    rows = torch.tensor([ids[s : s + length] for s in starts], dtype=torch.long)
    return Windows(rows, source, side, tuple(d.sha256 for d in documents), sum(len(d.text) for d in documents))


def _tokenise(tokenizer: Any, documents: list[Document]) -> list[int]:
    """Ids of all documents, each opened by the tokenizer's document mark (BOS, else EOS) if it has one."""
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = []
    for document in documents:
        ids += ([] if mark is None else [mark]) + tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
