"""What our own classes share: OLMoE's decoder with routers, and blocks, of another kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeSparseMoeBlock

from .history import TokenHistory


class OwnOlmoe(OlmoeForCausalLM):
    """OLMoE with every layer's block changed by `block`. A router gives (logits [T, C], weights [T, k], ids [T, k]).

    looks_back: whether routers look at earlier tokens. They are `history.LookingModule`, and who packs texts into one row has to show them.
    """

    looks_back = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        carried = Carried()
        for index, layer in enumerate(self.model.layers):
            layer.mlp = self.block(config, index, carried)
        self.join()
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Eager alone: the others give no number for the id that means no expert."""
        return False

    def block(self, config: Any, index: int, carried: Carried) -> nn.Module:
        """The block of one layer. carried: what layers hand on within a forward."""
        raise NotImplementedError(type(self).__name__)

    def history(self, index: int) -> TokenHistory:
        """What a router of this layer keeps of earlier tokens."""
        return TokenHistory(self.model.layers[index].self_attn, index, self.config.num_hidden_layers)

    def join(self) -> None:
        """Once all blocks are there."""


class Carried:
    """A tensor that a layer leaves for the next one of the same forward; the first layer takes none."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self, index: int) -> Tensor | None:
        """What the layer before has left."""
        return None if index == 0 else self.value


class OwnBlock(OlmoeSparseMoeBlock):
    """OLMoE's block with another router. Ids from E on are given to the experts as E, which is none, and to `beside`."""

    def __init__(self, config: Any, gate: nn.Module) -> None:
        super().__init__(config)
        self.gate = gate

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, ids = self.gate(self.routed(hidden_states))
        matrices = ids < self.experts.num_experts
        out = self.experts(x, ids.clamp(max=self.experts.num_experts), weights * matrices)
        more = self.beside(x, ids, weights)
        out = out if more is None else out + more
        found: Tensor = out.reshape(hidden_states.shape)
        return found

    def routed(self, hidden_states: Tensor) -> Tensor:
        """What the router is given of hidden_states [B, L, d]."""
        return hidden_states.reshape(-1, hidden_states.shape[-1])

    def beside(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """What experts without matrices add [T, d]."""
        return None


class LookingBlock(OwnBlock):
    """One whose router sees texts [B, L, d] and their history. A flat batch of tokens is one text."""

    def __init__(self, config: Any, gate: nn.Module, history: TokenHistory) -> None:
        super().__init__(config, gate)
        gate.__dict__["history"] = history

    def routed(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if hidden_states.ndim == 3 else hidden_states[None]


def chosen(logits: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """(weights [T, k] in the type of logits [T, C], ids [T, k]): the k largest probabilities, made to add up to one if asked."""
    weights, ids = kept(logits.float().softmax(-1), k, normalise)
    return weights.to(logits.dtype), ids


def kept(probabilities: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """(weights [T, k], ids [T, k]) of the k largest of probabilities [T, C], made to add up to one if asked."""
    weights, ids = torch.topk(probabilities, k, -1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids
