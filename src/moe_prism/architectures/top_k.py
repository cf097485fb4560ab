"""The plain mixture of experts that others are compared with: OLMoE's class with a learned router and a fixed k."""

from __future__ import annotations

from typing import Any

from transformers import OlmoeConfig

from ..schema.common import Form
from .base import Architecture, TokenIds, olmoe_keys


class TopKSettings(Form):
    """normalise: whether the weights of the chosen experts are made to add up to one."""

    normalise: bool = True


class TopK(Architecture):
    """softmax over the router's logits, the k largest (Shazeer et al., arXiv 1701.06538)."""

    Settings = TopKSettings

    def config(self, vocabulary: TokenIds) -> Any:
        return OlmoeConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=self.settings.normalise)
