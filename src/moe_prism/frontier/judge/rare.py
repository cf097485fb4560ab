"""The rarest tokens of the text, which a mean over all tokens hardly holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Material, NoQuestionsError, Slice, Spans, spread

SHARE = 0.1
TOKENS = 8_192  # of the text that are read


class Rare(Slice):
    """The tokens of held-out windows that occur least often in them: all up to the count at which they are a tenth of the text.

    A group is a window.
    """

    name = "rare"

    def __init__(self, material: Material) -> None:
        rows = torch.stack(spread(list(material.ids), max(1, TOKENS // material.ids.shape[1])))
        asked = rows[:, 1:]
        often = torch.bincount(asked.reshape(-1))[asked]
        counts, _ = often.reshape(-1).sort()
        limit = counts[min(len(counts) - 1, int(SHARE * len(counts)))]
        if limit == counts[-1]:
            raise NoQuestionsError("all tokens of the text are equally rare")
        row, place = torch.where(often <= limit)
        self.asked, self.groups = Spans(rows, torch.stack([row, place + 1, place + 2], 1)), row

    def verdicts(self, model: Any) -> Tensor:
        return self.asked.verdicts(model)
