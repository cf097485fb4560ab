"""SMoE-Dropout (arXiv 2303.01610): a router that is drawn and never trained, and a k that grows until all experts take part.

What comes out is an ordinary OLMoE checkpoint at the largest k. Its quality falls slowly where fewer experts run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import OlmoeConfig

from ..errors import UsageError
from ..schema.common import Form
from ..schema.training import ShapeForm
from .base import Architecture, TokenIds, TrainingPart, olmoe_keys
from .parts import CountSchedule, Frozen

ROUTER = r"\.gate\.weight$"


class SMoEDropoutSettings(Form):
    """first: k at the beginning. schedule: how k rises to `model.active`: along a line, or in doublings of equal length."""

    first: Annotated[int, Field(ge=1, le=4096)] = 1
    schedule: Literal["line", "doublings"] = "line"


class SMoEDropout(Architecture):
    """A frozen random router; k = round((last - first) x share of training) + first (the paper's linear schedule)."""

    Settings = SMoEDropoutSettings

    def config(self, vocabulary: TokenIds) -> Any:
        if self.settings.first > self.shape.active:
            raise UsageError(
                f"settings.first {self.settings.first} is more than model.active {self.shape.active}", "k must not fall"
            )
        return OlmoeConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=True)

    def parts(self) -> list[TrainingPart]:
        return [Frozen(ROUTER), CountSchedule(lambda _layer, _layers, share: self.count(share))]

    def count(self, share: float) -> int:
        """k when this share of training is gone."""
        first, last = self.settings.first, self.shape.active
        if self.settings.schedule == "line":
            return int(min(last, round((last - first) * share) + first))
        stairs = [first]
        while stairs[-1] < last:
            stairs.append(min(last, 2 * stairs[-1]))
        return int(stairs[min(len(stairs) - 1, int(share * len(stairs)))])

    @classmethod
    def example(cls) -> tuple[ShapeForm, dict[str, Any]]:
        shape, _ = super().example()
        return shape.model_copy(update={"active": shape.experts}), {}
