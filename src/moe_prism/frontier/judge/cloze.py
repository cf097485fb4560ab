"""Closed-book cloze: a word that nothing in sight gives away."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .base import Material, NoQuestionsError, Slice, Spans, spread

CONTEXT = 24  # tokens before the word: all that the model sees
TOKENS = 4  # of a word at most
LETTERS = 4  # of a word at least
COMMON = 32  # words of the text that everybody writes
MOST = 1024


class Cloze(Slice):
    """The next word after 24 tokens of held-out text, none of which holds it, and not one of the text's most frequent.

    What is asked is then in the weights or nowhere. A group is a window.
    """

    name = "cloze"

    def __init__(self, material: Material) -> None:
        counts = Counter(word.text.lower() for row in material.words for word in row)
        common = {text for text, _ in counts.most_common(COMMON)}
        found = []
        for number, (ids, row) in enumerate(zip(material.ids.tolist(), material.words, strict=True)):
            for word in row:
                fits = CONTEXT <= word.first <= len(ids) - TOKENS and word.stop - word.first <= TOKENS
                text = word.text.lower()
                if not fits or len(text) < LETTERS or text in common:
                    continue
                if text not in material.tokenizer.decode(ids[word.first - CONTEXT : word.first]).lower():
                    found.append((number, word))
        if not found:
            raise NoQuestionsError("the text has no words that the tokens before them do not hold")
        chosen = spread(found, MOST)
        rows = torch.stack([material.ids[n, w.first - CONTEXT : w.first + TOKENS] for n, w in chosen])
        spans = [(i, CONTEXT, CONTEXT + w.stop - w.first) for i, (_, w) in enumerate(chosen)]
        self.asked, self.groups = Spans(rows, torch.tensor(spans)), torch.tensor([n for n, _ in chosen])

    def verdicts(self, model: Any) -> Tensor:
        return self.asked.verdicts(model)
