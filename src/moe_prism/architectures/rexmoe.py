"""ReXMoE (arXiv 2510.17483): a layer's router may choose the experts of its neighbours, so that only routers grow.

Shapes: T tokens, E experts of a layer, r layers of a group, k experts per token.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from huggingface_hub.dataclasses import strict
from pydantic import Field
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from ..errors import UsageError
from ..schema.common import Form, Share
from .base import Architecture, StepPlace, TokenIds, TrainingPart, olmoe_keys, register, routers
from .olmoe import Carried, OwnOlmoe, chosen

PURPOSE = 3


@strict
class ReXMoEConfig(OlmoeConfig):
    """OLMoE's, with the layers of a group. num_experts counts those of one layer."""

    model_type = "prism_rexmoe"

    group_layers: int = 2


class GroupRouter(nn.Module):
    """Scores of all r E experts of the group, in the order of its layers. closed: columns that training shuts for a step."""

    def __init__(self, config: ReXMoEConfig) -> None:
        super().__init__()
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.group_layers * config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        self.closed: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, r E], weights [T, k], ids [T, k])."""
        logits = nn.functional.linear(x, self.weight)
        if self.closed is not None:
            logits = logits.masked_fill(self.closed, torch.finfo(logits.dtype).min)
        return logits, *chosen(logits, self.top_k, self.normalise)


class GroupBlock(OlmoeSparseMoeBlock):
    """A layer's own experts, and by reference those of its group."""

    def __init__(self, config: ReXMoEConfig) -> None:
        super().__init__(config)
        self.gate = GroupRouter(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(x)
        experts, out = self.experts.num_experts, torch.zeros_like(x)
        for number, block in enumerate(self.__dict__["group"]):
            own = ids // experts == number
            out = out + block.experts(x, torch.where(own, ids - number * experts, experts), weights * own)
        found: Tensor = out.reshape(hidden_states.shape)
        return found


class ReXMoEForCausalLM(OwnOlmoe):
    """OLMoE whose neighbouring layers share their experts."""

    config_class = ReXMoEConfig

    def block(self, config: ReXMoEConfig, index: int, carried: Carried) -> nn.Module:
        return GroupBlock(config)

    def join(self) -> None:
        blocks, size = [layer.mlp for layer in self.model.layers], self.config.group_layers
        for index, block in enumerate(blocks):
            start = index // size * size
            block.__dict__["group"] = blocks[start : start + size]


class Progressive(TrainingPart):
    """N_t experts of a group are open: as many as one layer has until `begin` of the steps, all from `end` on, a line between."""

    def __init__(self, experts: int, layers: int, begin: float, end: float) -> None:
        self.experts, self.layers, self.first, self.last = experts, layers, begin, end

    def count(self, share: float) -> int:
        """N_t when this share of training is gone."""
        if share <= self.first:
            return self.experts
        if share >= self.last:
            return self.layers * self.experts
        return int((1 + (self.layers - 1) * (share - self.first) / (self.last - self.first)) * self.experts)

    def begin(self, model: nn.Module, place: StepPlace) -> None:
        generator, every = place.generator(PURPOSE, whole=True), self.layers * self.experts
        shut = every - self.count(place.share)
        for router in routers(model):
            closed = torch.zeros(every, dtype=torch.bool)
            closed[torch.randperm(every, generator=generator)[:shut]] = True
            router.closed = closed if shut else None  # type: ignore[assignment]

    def finish(self, model: nn.Module) -> None:
        for router in routers(model):
            router.closed = None  # type: ignore[assignment]


class ReXMoESettings(Form):
    """group: layers that share. begin, end: shares of training between which more experts are opened."""

    group: Annotated[int, Field(ge=1, le=64)] = 2
    begin: Share = 0.1
    end: Share = 0.6


class ReXMoE(Architecture):
    """`model.experts` counts those of one layer."""

    Settings = ReXMoESettings

    def config(self, vocabulary: TokenIds) -> Any:
        s = self.settings
        if self.shape.layers % s.group:
            raise UsageError(f"model.layers {self.shape.layers} is no multiple of settings.group {s.group}", "give a divisor")
        if s.begin > s.end:
            raise UsageError(f"settings.begin {s.begin} comes after settings.end {s.end}", "give the smaller one first")
        return ReXMoEConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=True, group_layers=s.group)

    def parts(self) -> list[TrainingPart]:
        s = self.settings
        return [Progressive(self.shape.experts, s.group, s.begin, s.end)]


register(ReXMoEConfig, ReXMoEForCausalLM)
