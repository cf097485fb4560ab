"""Exact continuation: whether greedy text is the full model's, to the last token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Material, NoQuestionsError, Slice, Spans, batches, greedy, spread

PROMPT = 64
NEW = 64
MOST = 64


class Continuation(Slice):
    """64 tokens of held-out text, continued by 64 greedy ones of the full model. Right is a point that writes the same 64.

    Nothing is generated twice: a point writes them if each is its most likely token after the ones before. A group is a window.
    """

    name = "continuation"
    is_ability = False

    def __init__(self, material: Material) -> None:
        ids = material.ids
        if ids.shape[1] < PROMPT:
            raise NoQuestionsError(f"windows have fewer than {PROMPT} tokens")
        places = [(n, at) for n in range(len(ids)) for at in range(0, ids.shape[1] - PROMPT + 1, PROMPT)]
        chosen = spread(places, MOST)
        prompts = torch.stack([ids[n, at : at + PROMPT] for n, at in chosen])
        made = [greedy(material.model, rows, NEW) for rows in batches(prompts, NEW)]
        spans = [(i, PROMPT, PROMPT + NEW) for i in range(len(prompts))]
        self.asked = Spans(torch.cat([prompts, torch.cat(made)], 1), torch.tensor(spans))
        self.groups = torch.tensor([n for n, _ in chosen])

    def verdicts(self, model: Any) -> Tensor:
        return self.asked.verdicts(model)
