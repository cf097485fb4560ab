"""Documents to token windows of equal length."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..options.text import TextSource
from ..tally import TextTally, report_reading
from .bundled import BUNDLED
from .chat import Chat
from .document import Document
from .sample import bounded
from .splits import Side, split_documents
from .text import Reading, stream_documents

HELD_CHARACTERS = 1 << 24  # of a source; of a larger one a sample is held,
CHARACTERS_PER_TOKEN = 32  # and more where more is asked for


@dataclass(frozen=True)
class Windows:
    """Token ids [n, length] and where they came from. parts: (domain, rows) in the order of the rows, one without a name for plain text."""

    ids: Tensor
    text: TextSource
    side: Side
    documents: tuple[str, ...]  # SHA-256 of each document that has a part in the windows
    characters: int  # of all documents used
    parts: tuple[tuple[str, int], ...] = ()
    read: tuple[dict[str, Any], ...] = field(default=(), compare=False)  # see `TextTally.to_json`, of every path
    span: tuple[int, int] | None = None  # the windows that this process runs, of several that share them; None: all

    @property
    def source(self) -> str:
        """For people, see `TextSource.label`."""
        return self.text.label

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def facts(self) -> dict[str, Any]:
        """For a manifest: the text, its domains, and what was left out of it."""
        domains = {name: rows * self.ids.shape[1] for name, rows in self.parts if name}
        counted = [row for row in self.read if len(row) > 2]
        return {**self.text.facts(), **({"domains": domains} if domains else {}), **({"read": counted} if counted else {})}


def token_windows(
    tokenizer: Any, source: str | TextSource, side: Side, *, length: int, tokens: int, exclude: Sequence[str] = ()
) -> Windows:
    """About `tokens` tokens of one side of a source, as windows [n, length] spread evenly over it; of several domains, as many of each.

    exclude: SHA-256 of documents that must not be used (the calibration text, when evaluating). Deterministic.
    Raises UsageError if fewer tokens than one window are left of the source, or of one of its domains.
    """
    source = TextSource.of(source)
    if source.fields and all(path in BUNDLED for _, path in source.parts):
        raise UsageError(f"text source '{source.label}' has no fields", "leave --text-field out, or name a file of rows")
    share = max(1, tokens // length // len(source.parts)) * length
    known = set(exclude)
    if len(source.parts) > 1 and side == "evaluation":  # what is calibration text of one domain is not evaluation text of another
        known |= {d.sha256 for part in source.parts for d in _documents(tokenizer, part[1], source, share, "calibration")[0]}
    found, used, read = [], [], []
    for name, path in source.parts:
        documents, tally = _documents(tokenizer, path, source, share, side)
        documents = [d for d in documents if d.sha256 not in known]
        ids, ends = _tokenise(tokenizer, documents)
        if len(ids) < length:
            raise UsageError(
                f"text source '{path}' has {len(ids)} tokens for {side}, less than one window of {length}",
                "give more text or a smaller --length",
            )
        starts = _spread(len(ids) // length, share // length)
        found.append(torch.tensor([ids[s * length : (s + 1) * length] for s in starts], dtype=torch.long))
        if name and len(found[-1]) * length < share:
            tally.remark(f"tokens less than the {share} of domain {name}", path, share - len(found[-1]) * length)
        report_reading(tally)
        used += _within(documents, ends, starts, length)
        read.append(tally.to_json())
    parts = tuple((name, len(rows)) for (name, _), rows in zip(source.parts, found, strict=True))
    hashes = tuple(dict.fromkeys(d.sha256 for d in used))
    return Windows(torch.cat(found), source, side, hashes, sum(len(d.text) for d in used), parts, tuple(read))


def _documents(tokenizer: Any, path: str, source: TextSource, tokens: int, side: Side) -> tuple[list[Document], TextTally]:
    """One side of a path, and what came of reading it."""
    tally = TextTally(path)
    with Chat(tokenizer) as chat:
        every = stream_documents(path, Reading(tally, source.fields, chat))
        limit = max(HELD_CHARACTERS, CHARACTERS_PER_TOKEN * tokens)
        return split_documents(bounded(every, limit, tally), side, source=path), tally


def _spread(available: int, wanted: int) -> list[int]:
    """Places of at most so many windows, evenly spread: a part of a source is then a sample of all of it."""
    count = min(available, wanted)
    return [i * available // count for i in range(count)]


def _tokenise(tokenizer: Any, documents: Iterable[Document]) -> tuple[list[int], list[int]]:
    """Ids of all documents, each opened by the tokenizer's document mark (BOS, else EOS) if it has one, once; and where each ends."""
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids: list[int] = []
    ends = []
    for document in documents:
        found = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        # a chat template writes its own
        ids += found if mark is None or found[:1] == [mark] else [mark, *found]
        ends.append(len(ids))
    return ids, ends


def _within(documents: Sequence[Document], ends: Sequence[int], starts: Sequence[int], length: int) -> list[Document]:
    """The documents that have a token in one of the windows at starts x length."""
    places = {p for s in starts for p in range(bisect_right(ends, s * length), bisect_right(ends, (s + 1) * length - 1) + 1)}
    return [documents[p] for p in sorted(places)]
