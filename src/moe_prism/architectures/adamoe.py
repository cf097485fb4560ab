"""AdaMoE (arXiv 2406.13233): experts that do nothing stand beside the true ones, so that a token takes as many true ones as it needs.

Shapes: T tokens, E true experts, m null ones, k choices per token.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from huggingface_hub.dataclasses import strict
from pydantic import Field
from torch import Tensor, nn
from transformers import OlmoeConfig

from ..schema.common import Amount, Form
from .base import Architecture, StepSeen, TokenIds, TrainingPart, olmoe_keys, register
from .olmoe import Carried, OwnBlock, OwnOlmoe


@strict
class AdaMoEConfig(OlmoeConfig):
    """OLMoE's, with m null experts. A token chooses num_experts_per_tok of all."""

    model_type = "prism_adamoe"

    null_experts: int = 0


class NullRouter(nn.Module):
    """Softmax over E + m columns, the k largest; the weights of true experts are made to add up to one, those of null ones are 0."""

    def __init__(self, config: AdaMoEConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts, self.normalise = config.num_experts_per_tok, config.num_experts, config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts + config.null_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E + m], weights [T, k], ids [T, k]); ids from E on are null."""
        logits = nn.functional.linear(x, self.weight)
        weights, ids = logits.float().softmax(-1).topk(self.top_k, -1)
        weights = weights * (ids < self.num_experts)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return logits, weights.to(logits.dtype), ids


class AdaMoEForCausalLM(OwnOlmoe):
    """OLMoE with routers that may choose nothing."""

    config_class = AdaMoEConfig

    def block(self, config: AdaMoEConfig, index: int, carried: Carried) -> nn.Module:
        return OwnBlock(config, NullRouter(config))


class NullBalance(TrainingPart):
    """alpha (E + m) x sum of f P, where every null expert counts as the mean of all of them: they need no balance among each other."""

    def __init__(self, weight: float, experts: int) -> None:
        self.weight, self.experts = weight, experts

    def loss(self, seen: StepSeen) -> Tensor | None:
        if not self.weight:
            return None
        terms = []
        for routing in seen.routings:
            share = routing.chosen.float().mean(0)
            null = share[self.experts :]
            share = torch.cat([share[: self.experts], null.mean().expand(len(null)) if len(null) else null])
            terms.append(len(share) * (share * routing.logits.float().softmax(-1).mean(0)).sum())
        return self.weight * torch.stack(terms).mean()


class AdaMoESettings(Form):
    """nulls: experts that do nothing, m; with even use a token has k E / (E + m) true ones.

    balance: weight of the loss here; the recipe's is 0 then.
    """

    nulls: Annotated[int, Field(ge=0, le=4096)] = 16
    balance: Amount = 0.01


class AdaMoE(Architecture):
    """`model.active` counts true and null choices."""

    Settings = AdaMoESettings

    def config(self, vocabulary: TokenIds) -> Any:
        return AdaMoEConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=True, null_experts=self.settings.nulls)

    def parts(self) -> list[TrainingPart]:
        return [NullBalance(self.settings.balance, self.shape.experts)]

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape, {"nulls": 3}


register(AdaMoEConfig, AdaMoEForCausalLM)
