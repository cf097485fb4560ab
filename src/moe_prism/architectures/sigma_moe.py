"""Sigma-MoE-Tiny (arXiv 2512.16248): one expert per token in the end, and more of them early in training where balance fails.

With one expert of many, the balance loss leaves the lowest layers skewed. So their k falls while training is young. The paper's schedule
was not found: here k falls along a line over the first `share` of the steps in the lowest `layers` of the layers.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field
from transformers import OlmoeConfig

from ..errors import UsageError
from ..schema.common import Budget, Form, Share
from .base import Architecture, TokenIds, TrainingPart, olmoe_keys
from .parts import CountSchedule


class SigmaMoESettings(Form):
    """first: k of the lowest layers at the beginning. share: of the steps, in which it falls. layers: which share of the layers."""

    first: Annotated[int, Field(ge=1, le=4096)] = 8
    share: Share = 0.2
    layers: Budget = 0.25


class SigmaMoE(Architecture):
    """OLMoE's class; the weights of chosen experts are their probabilities, so that a router of one expert learns."""

    Settings = SigmaMoESettings

    def config(self, vocabulary: TokenIds) -> Any:
        if not self.shape.active <= self.settings.first <= self.shape.experts:
            raise UsageError(
                f"settings.first {self.settings.first} lies outside of {self.shape.active} to {self.shape.experts}",
                "give at least model.active and at most model.experts",
            )
        return OlmoeConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=False)

    def parts(self) -> list[TrainingPart]:
        return [CountSchedule(self.count)]

    def count(self, layer: int, layers: int, share: float) -> int:
        """k of a layer when this share of training is gone."""
        first, last, until = self.settings.first, self.shape.active, self.settings.share
        if layer >= math.ceil(self.settings.layers * layers) or share >= until:
            return int(last)
        k: int = round(first + (last - first) * share / until)
        return k

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape.model_copy(update={"active": 1}), {"first": 3, "share": 0.5}
