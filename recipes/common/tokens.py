"""Texts to a tokenizer and token files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # digits one by one and indentation as its own piece: both keep the small vocabulary for words
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
    """Ids of each text, opened by <|endoftext|>; no more texts than `limit` tokens take."""
    rows: list[list[int]] = []
    total = 0
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch(texts[start : start + 256]):
            rows.append([0, *encoding.ids])
            total += len(rows[-1])
            if limit is not None and total >= limit:
                return rows
    return rows


def write_tokens(path: Path, rows: Sequence[Sequence[int]]) -> int:
    """One file of uint16 ids; returns how many."""
    ids = np.concatenate([np.asarray(r, np.uint16) for r in rows])
    ids.tofile(path)
    return len(ids)
