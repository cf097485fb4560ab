"""Graph of tokens (arXiv 2505.00792): a token's experts also follow from what the router says of tokens like it.

p_i = (1 - a) r_i + a sum_j S_ij r_j with r = softmax(W x), over the tokens that i sees. S-MoE: S is a softmax over x_i A x_j / sqrt(d),
with A learned. A-MoE: S is what the layer's attention gave, the mean over its heads. The exact parametrisation was not found. Shapes: B
texts, L tokens, T = B L, S tokens so far, d hidden, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import OlmoeConfig

from ..schema.common import Form, Share
from .base import Architecture, TokenIds, olmoe_keys, register
from .history import LookingModule
from .olmoe import Carried, LookingBlock, OwnOlmoe, chosen, kept


@strict
class GraphConfig(OlmoeConfig):
    """OLMoE's, with the share of neighbours and what makes tokens neighbours."""

    model_type = "prism_graph_of_tokens"

    neighbour_share: float = 0.5
    neighbours_by: str = "similarity"


class GraphRouter(LookingModule):
    """Scores of like tokens mixed into a token's own."""

    def __init__(self, config: GraphConfig) -> None:
        super().__init__()
        self.top_k, self.normalise, self.share = config.num_experts_per_tok, config.norm_topk_prob, config.neighbour_share
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        learned = self.share and config.neighbours_by == "similarity"
        self.likeness = nn.Parameter(torch.zeros(config.hidden_size, config.hidden_size)) if learned else None

    def look(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, d] -> (logits [T, E], weights [T, k], ids [T, k])."""
        logits = nn.functional.linear(x, self.weight)
        if not self.share:
            return logits.flatten(0, 1), *chosen(logits.flatten(0, 1), self.top_k, self.normalise)
        own = logits.float().softmax(-1)
        mixed = (1 - self.share) * own + self.share * self._neighbours(x, own)
        weights, ids = kept(mixed.flatten(0, 1), self.top_k, self.normalise)
        return mixed.flatten(0, 1).clamp_min(1e-30).log(), weights.to(x.dtype), ids

    def _neighbours(self, x: Tensor, own: Tensor) -> Tensor:
        """[B, L, E]: the sum of S_ij r_j."""
        if self.likeness is None:
            attended, earlier = self.history.weights(), self.history.add(own)
            return own if attended is None else attended.float().mean(1) @ earlier.values
        earlier = self.history.add(torch.cat([x.float(), own], -1))
        keys, scores = torch.split(earlier.values, [x.shape[-1], own.shape[-1]], -1)
        alike = (x.float() @ self.likeness.float()) @ keys.mT / x.shape[-1] ** 0.5
        found: Tensor = alike.masked_fill(~earlier.seen, -torch.inf).softmax(-1) @ scores
        return found


class GraphForCausalLM(OwnOlmoe):
    """OLMoE with such routers. Attention that hands on its weights is computed eagerly."""

    config_class = GraphConfig
    looks_back = True

    def __init__(self, config: GraphConfig) -> None:
        if config.neighbours_by == "attention":
            config._attn_implementation = "eager"
        super().__init__(config)

    def block(self, config: GraphConfig, index: int, carried: Carried) -> nn.Module:
        return LookingBlock(config, GraphRouter(config), self.history(index))


class GraphSettings(Form):
    """share: of a token's scores that comes from its neighbours; 0 is a plain mixture. by: what makes tokens neighbours."""

    share: Share = 0.5
    by: Literal["similarity", "attention"] = "similarity"


class GraphOfTokens(Architecture):
    """Trained like a plain mixture. Balance is asked of the mixed scores."""

    Settings = GraphSettings

    def config(self, vocabulary: TokenIds) -> Any:
        s = self.settings
        keys = olmoe_keys(self.shape, vocabulary)
        return GraphConfig(**keys, norm_topk_prob=True, neighbour_share=s.share, neighbours_by=s.by)


register(GraphConfig, GraphForCausalLM)
