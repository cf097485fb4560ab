"""Read-ME's router (arXiv 2410.19123): one small causal transformer in front of the model says the experts of all layers.

So they are known before the first layer runs. state = P x + sum_j S_ij V x_j over the embeddings x that a token sees, by several heads,
then a SwiGLU; S is a softmax over q_i . k_j / sqrt(h) less a slope times the distance (arXiv 2108.12409), which needs no positions. The
paper's experts are domains of a dense model, and a token keeps its own through all layers; these are trained from nothing, so every
layer reads its choice from the state by weights of its own. Shapes: B texts, L tokens, S tokens so far, T tokens, d hidden, s of the
state, H heads of h numbers, E experts, k experts per token.
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
from .history import LookingModule, TokenHistory
from .olmoe import Carried, OwnBlock, OwnOlmoe, chosen

HEADS = 4


@strict
class ReadMeConfig(OlmoeConfig):
    """OLMoE's, with the size of the state that stands in front of the layers: HEADS times as many numbers as a head has."""

    model_type = "prism_read_me"

    ahead_state: int = 64


class AheadRouter(LookingModule):
    """The transformer layer in front. It is run by the first layer's gate, when the cache and the mask are known."""

    def __init__(self, config: ReadMeConfig) -> None:
        super().__init__()
        d, s = config.hidden_size, config.ahead_state
        self.enter, self.attend = nn.Linear(d, s, bias=False), nn.Linear(d, 3 * s, bias=False)
        self.norm = nn.RMSNorm(s, eps=config.rms_norm_eps)
        self.up, self.leave = nn.Linear(s, 4 * s, bias=False), nn.Linear(2 * s, s, bias=False)
        self.embedded: Tensor | None = None

    def note(self, _layer: nn.Module, given: Any, named: dict[str, Any]) -> None:
        """Before the first layer: what it is given."""
        self.embedded = named["hidden_states"] if "hidden_states" in named else given[0]

    def look(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, L, d] -> (state [B L, s],)."""
        x = nn.functional.rms_norm(x, x.shape[-1:])
        query, keys = self.attend(x).split([self.enter.out_features, 2 * self.enter.out_features], -1)
        earlier = self.history.add(keys)
        key, value = (_heads(part) for part in earlier.values.chunk(2, -1))
        scores = _heads(query) @ key.mT / key.shape[-1] ** 0.5
        length, size = x.shape[1], key.shape[2]
        distance = torch.arange(size - length, size, device=x.device)[:, None] - torch.arange(size, device=x.device)
        slopes = 4.0 ** -torch.arange(1, HEADS + 1, device=x.device)
        scores = scores - (slopes[:, None, None] * distance).to(scores.dtype)
        seen = scores.masked_fill(~earlier.seen[:, None], -torch.inf).softmax(-1) @ value
        state = self.enter(x) + seen.transpose(1, 2).flatten(2)
        gate, up = self.up(self.norm(state)).chunk(2, -1)
        state = self.norm(state + self.leave(nn.functional.silu(gate) * up))
        return (state.flatten(0, 1),)


def _heads(x: Tensor) -> Tensor:
    """[B, L, s] -> [B, H, L, h]."""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


class AheadGate(nn.Module):
    """A layer's choice, read from the state. x says nothing to it."""

    def __init__(self, config: ReadMeConfig, index: int, carried: Carried) -> None:
        super().__init__()
        self.top_k, self.normalise, self.index = config.num_experts_per_tok, config.norm_topk_prob, index
        self.__dict__["carried"] = carried
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.ahead_state))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E], weights [T, k], ids [T, k])."""
        ahead: AheadRouter = self.__dict__["ahead"]
        carried: Carried = self.__dict__["carried"]
        if self.index == 0:
            assert ahead.embedded is not None  # noted before the layer ran
            (carried.value,) = ahead(ahead.embedded)
        state = carried.value
        assert state is not None
        logits = nn.functional.linear(state, self.weight)
        return logits, *chosen(logits, self.top_k, self.normalise)


class ReadMeForCausalLM(OwnOlmoe):
    """OLMoE whose layers all follow one router. It is a module of the model, beside its layers."""

    config_class = ReadMeConfig
    looks_back = True

    def block(self, config: ReadMeConfig, index: int, carried: Carried) -> nn.Module:
        return OwnBlock(config, AheadGate(config, index, carried))

    def join(self) -> None:
        self.model.ahead = AheadRouter(self.config)
        self.model.ahead.__dict__["history"] = TokenHistory(self.model.layers[0].self_attn, 0, self.config.num_hidden_layers)
        self.model.layers[0].register_forward_pre_hook(self.model.ahead.note, with_kwargs=True)
        for layer in self.model.layers:
            layer.mlp.gate.__dict__["ahead"] = self.model.ahead


class ReadMeSettings(Form):
    """head: numbers of a head of the router, which has four."""

    head: Annotated[int, Field(ge=1, le=1 << 12)] = 16


class RouterAhead(Architecture):
    """Trained like a plain mixture."""

    Settings = ReadMeSettings

    def config(self, vocabulary: TokenIds) -> Any:
        keys = olmoe_keys(self.shape, vocabulary)
        return ReadMeConfig(**keys, norm_topk_prob=True, ahead_state=HEADS * self.settings.head)

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape, {"head": 2}


register(ReadMeConfig, ReadMeForCausalLM)
