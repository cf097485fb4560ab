"""Union of Experts (arXiv 2503.02495): one wide MLP in slices, of which a text's tokens compute some.

All slices with gates of one are the wide MLP itself. Two ways to choose: `experts`, one choice for a text, by the mean of what the layer
sees of it; `data`, every slice takes the tokens that it scores highest. The paper flattens a text of fixed length, and looks at all of it.
Here a token sees the tokens before it alone, as a model of language must. Heads of attention can be chosen in the same way; those that are
not count for nothing, and are computed all the same. Shapes: B texts, L tokens, T = B L, S tokens so far, d hidden, E slices (or heads), k
of them chosen.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from pydantic import Field
from torch import Tensor, nn
from transformers import OlmoeConfig

from ..errors import UsageError
from ..schema.common import Form
from .base import Architecture, TokenIds, olmoe_keys, register
from .history import Earlier, LookingModule, TokenHistory
from .olmoe import Carried, LookingBlock, OwnOlmoe


@strict
class UnionConfig(OlmoeConfig):
    """OLMoE's, with what chooses slices, whether their gates are one, and how many heads are chosen (0: all, without a choice)."""

    model_type = "prism_union_of_experts"

    selection: str = "experts"
    unit_gates: bool = False
    active_heads: int = 0


class UnionRouter(LookingModule):
    """Gates of chosen slices: k p / (sum of the chosen p) for `experts`, E p for `data`, with p = softmax(W x); one where all are even."""

    def __init__(self, config: UnionConfig, slices: int, active: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = active, slices
        self.by_text, self.unit = config.selection == "experts", config.unit_gates
        self.weight = nn.Parameter(torch.zeros(slices, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, d] -> (logits [T, E], gates [T, k or E], ids [T, k or E]); the id E means no slice."""
        scores = nn.functional.linear(x, self.weight)
        earlier = self.history.add(scores)
        if self.by_text:  # the mean of scores is the score of the mean
            scores = mean_of(earlier)
        logits = scores.flatten(0, 1)
        p = logits.float().softmax(-1)
        if self.by_text:
            gates, ids = p.topk(self.top_k, -1)
            gates = self.top_k * gates / gates.sum(-1, keepdim=True)
        else:
            taken = highest(scores, earlier, self.top_k / self.num_experts).flatten(0, 1)
            ids = torch.arange(self.num_experts, device=x.device).expand_as(p).masked_fill(~taken, self.num_experts)
            gates = self.num_experts * p * taken
        if self.unit:
            gates = (ids < self.num_experts).to(gates.dtype)
        return logits, gates.to(logits.dtype), ids


def mean_of(earlier: Earlier) -> Tensor:
    """[B, L, n]: of every token the mean over those that it sees."""
    shares = earlier.seen.to(earlier.values.dtype)
    return (shares / shares.sum(-1, keepdim=True)) @ earlier.values


def highest(scores: Tensor, earlier: Earlier, share: float) -> Tensor:
    """[B, L, E] bool: where scores [B, L, E] are among the highest share of what a token sees, at least the highest one."""
    above = earlier.values[:, None] > scores[:, :, None]  # [B, L, S, E]
    above = (above & earlier.seen[..., None]).sum(2)
    places = (share * earlier.seen.sum(-1, keepdim=True)).ceil()
    return above < places


class ChosenHeads:
    """Multiplies what every head of an attention gives by the gate of its text, before the heads are joined."""

    def __init__(self, attention: Any, router: UnionRouter) -> None:
        attention.head_router = self.router = router
        self.gates: Tensor | None = None
        attention.register_forward_pre_hook(self._choose, with_kwargs=True)
        attention.o_proj.register_forward_pre_hook(self._apply)

    def _choose(self, _module: nn.Module, given: Any, named: dict[str, Any]) -> None:
        x: Tensor = named["hidden_states"] if "hidden_states" in named else given[0]
        _, gates, ids = self.router(x)
        every = gates.new_zeros(len(gates), self.router.num_experts + 1).scatter(1, ids, gates)[:, :-1]
        self.gates = every.view(*x.shape[:2], -1)

    def _apply(self, _module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        gates = self.gates
        assert gates is not None  # an attention chooses before it joins its heads
        return ((given[0].view(*gates.shape, -1) * gates[..., None]).flatten(2),)


class UnionForCausalLM(OwnOlmoe):
    """OLMoE whose experts are slices of one MLP."""

    config_class = UnionConfig
    looks_back = True

    def block(self, config: UnionConfig, index: int, carried: Carried) -> nn.Module:
        router = UnionRouter(config, config.num_experts, config.num_experts_per_tok)
        return LookingBlock(config, router, self.history(index))

    def join(self) -> None:
        config = self.config
        for index, layer in enumerate(self.model.layers if config.active_heads else ()):
            router = UnionRouter(config, config.num_attention_heads, config.active_heads)
            history = TokenHistory(layer.self_attn, config.num_hidden_layers + index, config.num_hidden_layers)
            router.__dict__["history"] = history
            ChosenHeads(layer.self_attn, router)


class UnionSettings(Form):
    """selection: of slices for a text, or of tokens for a slice. unit: gates of one, with which all slices are the dense layer.

    heads: of attention that a text has; all without it.
    """

    selection: Literal["experts", "data"] = "experts"
    unit: bool = False
    heads: Annotated[int, Field(ge=1, le=4096)] | None = None


class UnionOfExperts(Architecture):
    """`model.experts` slices of `model.width` neurons each; a token computes `model.active` of them, or as many on average."""

    Settings = UnionSettings

    def config(self, vocabulary: TokenIds) -> Any:
        s = self.settings
        if s.heads is not None and s.heads > self.shape.heads:
            raise UsageError(f"settings.heads {s.heads} is more than model.heads {self.shape.heads}", "give as many at most")
        keys = olmoe_keys(self.shape, vocabulary)
        return UnionConfig(**keys, norm_topk_prob=True, selection=s.selection, unit_gates=s.unit, active_heads=s.heads or 0)

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape, {"heads": 1}


register(UnionConfig, UnionForCausalLM)
