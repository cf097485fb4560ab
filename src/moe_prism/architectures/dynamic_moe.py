"""Dynamic-MoE (arXiv 2403.07652): a token takes the fewest experts whose probabilities reach p, and an entropy loss keeps them few.

Shapes: T tokens, E experts, k the most experts of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from ..schema.common import Amount, Budget, Form
from ..schema.training import ShapeForm
from .base import Architecture, StepSeen, TokenIds, TrainingPart, olmoe_keys, register
from .olmoe import Carried, OwnBlock, OwnOlmoe


@strict
class DynamicMoEConfig(OlmoeConfig):
    """OLMoE's, with the share of probability that a token's experts reach."""

    model_type = "prism_dynamic_moe"

    router_top_p: float = 0.4


class TopPRouter(OlmoeTopKRouter):
    """Weights are probabilities, as they are. The id E, with weight 0, stands for no expert."""

    def __init__(self, config: DynamicMoEConfig) -> None:
        super().__init__(config)
        self.top_p = config.router_top_p

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, k], ids [T, k])."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        logits = nn.functional.linear(x, self.weight)
        probabilities = logits.float().softmax(-1)
        weights, ids = probabilities.topk(self.top_k, -1)
        before = weights.cumsum(-1) - weights
        ids = ids.masked_fill(before >= self.top_p, self.num_experts)
        return logits, weights.masked_fill(before >= self.top_p, 0).to(logits.dtype), ids


class DynamicMoEForCausalLM(OwnOlmoe):
    """OLMoE with routers of its own."""

    config_class = DynamicMoEConfig

    def block(self, config: DynamicMoEConfig, index: int, carried: Carried) -> nn.Module:
        return OwnBlock(config, TopPRouter(config))


class EntropyLoss(TrainingPart):
    """Mean over layers of the entropy of the router's probabilities, in nats (the paper's eq. 8)."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, seen: StepSeen) -> Tensor | None:
        if not self.weight:
            return None
        logs = [r.logits.float().log_softmax(-1) for r in seen.routings]
        return self.weight * torch.stack([-(log.exp() * log).sum(-1).mean() for log in logs]).mean()


class DynamicMoESettings(Form):
    """top_p: the share of probability; 1 takes `model.active` experts always. entropy: weight of its loss (the paper's is 1e-4)."""

    top_p: Budget = 0.4
    entropy: Amount = 1e-4


class DynamicMoE(Architecture):
    """`model.active` is the most that a token can take."""

    Settings = DynamicMoESettings

    def config(self, vocabulary: TokenIds) -> Any:
        return DynamicMoEConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=False, router_top_p=self.settings.top_p)

    def parts(self) -> list[TrainingPart]:
        return [EntropyLoss(self.settings.entropy)]

    @classmethod
    def example(cls) -> tuple[ShapeForm, dict[str, Any]]:
        shape, _ = super().example()
        return shape.model_copy(update={"active": shape.experts}), {"top_p": 0.6, "entropy": 0.1}


register(DynamicMoEConfig, DynamicMoEForCausalLM)
