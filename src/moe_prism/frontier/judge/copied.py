"""Copying from context: a random key, text, the key's first half, and then?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import SEED, Material, NoQuestionsError, Slice, Spans

KEYS = 192
LENGTH = 8  # tokens of a key, of which the second half is asked
FILLER = 32  # tokens of the text before the key, and after it


class Copy(Slice):
    """Held-out text, a key of eight random word-beginnings of that text, more text, and the first half of the key again.

    Each token of the second half is a question. Nothing but the context knows it. A group is a key.
    """

    name = "copy"

    def __init__(self, material: Material) -> None:
        ids = material.ids
        begins = sorted({ids[n, word.first].item() for n, row in enumerate(material.words) for word in row})
        if len(begins) < 2 * LENGTH or ids.shape[1] < 2 * FILLER:
            raise NoQuestionsError(f"the text has fewer than {2 * LENGTH} words, or windows under {2 * FILLER} tokens")
        draw = torch.Generator().manual_seed(SEED)
        rows = []
        for number in range(KEYS):
            key = torch.tensor(begins)[torch.randperm(len(begins), generator=draw)[:LENGTH]]
            window = ids[number % len(ids)]
            start = int(torch.randint(len(window) - 2 * FILLER + 1, (1,), generator=draw))
            text = window[start : start + 2 * FILLER]
            rows.append(torch.cat([text[:FILLER], key, text[FILLER:], key]))
        half = len(rows[0]) - LENGTH // 2
        spans = [(n, place, place + 1) for n in range(KEYS) for place in range(half, half + LENGTH // 2)]
        self.asked = Spans(torch.stack(rows), torch.tensor(spans))
        self.groups = self.asked.spans[:, 0]

    def verdicts(self, model: Any) -> Tensor:
        return self.asked.verdicts(model)
