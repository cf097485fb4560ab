"""RMoE (arXiv 2408.06793): a recurrent state of every token runs through the routers of all layers.

Shapes: T tokens, d hidden, h numbers of the state, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from huggingface_hub.dataclasses import strict
from pydantic import Field
from torch import Tensor, nn
from transformers import OlmoeConfig

from ..schema.common import Form
from .base import Architecture, TokenIds, olmoe_keys, register
from .olmoe import Carried, OwnBlock, OwnOlmoe, chosen


@strict
class RMoEConfig(OlmoeConfig):
    """OLMoE's, with the size of the state that routers hand on."""

    model_type = "prism_rmoe"

    router_state: int = 256


class RecurrentRouter(nn.Module):
    """logits = R s, with s = GRU(P x, the s of the layer before); the GRU is that of all layers, P and R are the layer's own."""

    carried: Carried

    def __init__(self, config: RMoEConfig, index: int, carried: Carried) -> None:
        super().__init__()
        self.top_k, self.normalise, self.index = config.num_experts_per_tok, config.norm_topk_prob, index
        self.__dict__["carried"] = carried
        self.enter = nn.Linear(config.hidden_size, config.router_state, bias=False)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.router_state))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, k], ids [T, k])."""
        entered = self.enter(x)
        before = self.carried.take(self.index)
        state = self.__dict__["recurrence"](entered, torch.zeros_like(entered) if before is None else before)
        self.carried.value = state
        logits = nn.functional.linear(state, self.weight)
        return logits, *chosen(logits, self.top_k, self.normalise)


class RMoEForCausalLM(OwnOlmoe):
    """OLMoE with recurrent routers. The GRU is a module of the model, beside its layers."""

    config_class = RMoEConfig

    def block(self, config: RMoEConfig, index: int, carried: Carried) -> nn.Module:
        return OwnBlock(config, RecurrentRouter(config, index, carried))

    def join(self) -> None:
        self.model.recurrence = nn.GRUCell(self.config.router_state, self.config.router_state)
        for layer in self.model.layers:
            layer.mlp.gate.__dict__["recurrence"] = self.model.recurrence


class RMoESettings(Form):
    """state: numbers that a token's routers hand on."""

    state: Annotated[int, Field(ge=1, le=1 << 16)] = 64


class RMoE(Architecture):
    """Trained like a plain mixture."""

    Settings = RMoESettings

    def config(self, vocabulary: TokenIds) -> Any:
        return RMoEConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=True, router_state=self.settings.state)

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape, {"state": 6}


register(RMoEConfig, RMoEForCausalLM)
