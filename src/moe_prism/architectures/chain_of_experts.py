"""Chain-of-Experts (arXiv 2506.18945): a layer runs several routed passes over its experts, each with a router and a residual of its own.

Shapes: T tokens, d hidden, C passes, K experts per token in all passes together.
"""

from __future__ import annotations

from typing import Annotated, Any

from huggingface_hub.dataclasses import strict
from pydantic import Field
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts, OlmoeTopKRouter

from ..errors import UsageError
from ..schema.common import Form
from .base import Architecture, TokenIds, olmoe_keys, register
from .olmoe import Carried, OwnOlmoe


@strict
class ChainConfig(OlmoeConfig):
    """OLMoE's, with the passes of a layer. num_experts_per_tok counts those of one pass."""

    model_type = "prism_chain_of_experts"

    passes: int = 2


class ChainPass(nn.Module):
    """The router of one pass."""

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.gate = OlmoeTopKRouter(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, k], ids [T, k])."""
        found: tuple[Tensor, Tensor, Tensor] = self.gate(x)
        return found


class ChainBlock(nn.Module):
    """x_t = x_(t-1) + experts(x_(t-1), router t); the output is x_C."""

    def __init__(self, config: ChainConfig) -> None:
        super().__init__()
        self.passes = nn.ModuleList([ChainPass(config) for _ in range(config.passes)])
        self.experts = OlmoeExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        for one in self.passes:
            _, weights, ids = one(x)
            x = x + self.experts(x, ids, weights)
        found: Tensor = x.reshape(hidden_states.shape)
        return found


class ChainForCausalLM(OwnOlmoe):
    """OLMoE with chained passes."""

    config_class = ChainConfig

    def block(self, config: ChainConfig, index: int, carried: Carried) -> nn.Module:
        return ChainBlock(config)


class ChainSettings(Form):
    """passes: of a layer, each with `model.active` / passes experts."""

    passes: Annotated[int, Field(ge=1, le=64)] = 2


class ChainOfExperts(Architecture):
    """`model.active` counts expert calls of a token in a layer."""

    Settings = ChainSettings

    def config(self, vocabulary: TokenIds) -> Any:
        passes = self.settings.passes
        if self.shape.active % passes:
            raise UsageError(f"model.active {self.shape.active} is no multiple of settings.passes {passes}", "give a multiple")
        keys = olmoe_keys(self.shape, vocabulary) | {"num_experts_per_tok": self.shape.active // passes}
        return ChainConfig(**keys, norm_topk_prob=True, passes=passes)


register(ChainConfig, ChainForCausalLM)
