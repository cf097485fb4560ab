"""What most architectures learn: the next token of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.base import Predicted, StepPlace, TrainingTask

JUDGED = 16  # windows of held-out text


class NextToken(TrainingTask):
    """Cross-entropy, in nats per token. The data are two streams of ids [n]."""

    unit = "nats per token"

    def __init__(self, length: int) -> None:
        self.length = length

    def predict(self, run: Callable[..., Any], batch: Tensor, place: StepPlace) -> Predicted:
        ids, wanted = batch[:, :-1], batch[:, 1:]

        def again() -> Tensor:
            logits: Tensor = run(input_ids=ids, use_cache=False).logits
            return logits

        logits = again()
        return Predicted(nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten()), ids, logits, again)

    def judge(self, run: Callable[..., Any], held: Tensor) -> float:
        """Of up to JUDGED windows, spread over the text."""
        length = self.length
        starts = torch.linspace(0, len(held) - length - 1, min(JUDGED, max(1, len(held) // length))).long().tolist()
        losses = []
        for start in starts:
            row = held[start : start + length + 1].long()[None]
            logits = run(input_ids=row[:, :-1], use_cache=False).logits[0]
            losses.append(nn.functional.cross_entropy(logits.float(), row[0, 1:]))
        return float(torch.stack(losses).mean())
