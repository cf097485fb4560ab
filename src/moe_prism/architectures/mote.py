"""MoTE (arXiv 2506.14435): experts of three values beside the dense layer that they were copied from.

A dense model is trained first. Its MLP then stays as it is in every layer, and runs for every token. Copies of it become the routed
experts, which are trained as -1, 0 or 1 times one size per matrix, straight through (arXiv 1308.3432). The checkpoint holds those values in
an ordinary type, so that the codec `ternary` stores it in 1.6 bits per weight without another error. Shapes: T tokens, d hidden, E experts
of f neurons, o x i of a matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeMLP, OlmoeTopKRouter

from ..schema.common import Form, Share
from .base import Architecture, StepPlace, TokenIds, TrainingPart, olmoe_keys, register
from .olmoe import Carried, OwnBlock, OwnOlmoe
from .parts import StraightThrough


@strict
class MoTEConfig(OlmoeConfig):
    """OLMoE's. The dense layer is as wide as an expert."""

    model_type = "prism_mote"


class TernaryBlock(OwnBlock):
    """The dense layer, and what the chosen experts add. alone: nothing is chosen, as before there were experts."""

    alone = False

    def __init__(self, config: MoTEConfig) -> None:
        super().__init__(config, OlmoeTopKRouter(config))
        self.shared_expert = OlmoeMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        found: Tensor = self.shared_expert(hidden_states) if self.alone else super().forward(hidden_states)
        return found

    def beside(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        found: Tensor = self.shared_expert(x)
        return found

    @torch.no_grad()
    def copy_dense(self) -> None:
        """Every expert becomes the dense layer."""
        dense = self.shared_expert
        self.experts.gate_up_proj.copy_(
            torch.cat([dense.gate_proj.weight, dense.up_proj.weight]).expand_as(self.experts.gate_up_proj)
        )
        self.experts.down_proj.copy_(dense.down_proj.weight.expand_as(self.experts.down_proj))


class MoTEForCausalLM(OwnOlmoe):
    """OLMoE with such blocks."""

    config_class = MoTEConfig

    def block(self, config: MoTEConfig, index: int, carried: Carried) -> nn.Module:
        return TernaryBlock(config)


def ternary(weight: Tensor) -> Tensor:
    """-1, 0 or 1 times the mean size of every matrix of weight [E, o, i]; the size is one that two bytes hold."""
    size = weight.abs().mean((-2, -1), keepdim=True).bfloat16().to(weight.dtype).clamp_min(1e-7)
    return (weight / size).round().clamp(-1, 1) * size


class Upcycled(TrainingPart):
    """The dense layers alone for a share of the steps, then the experts alone, which begin as copies of them."""

    def __init__(self, dense: float) -> None:
        self.dense = dense

    def begin(self, model: nn.Module, place: StepPlace) -> None:
        first = math.ceil(self.dense * place.steps)
        for block in ternary_blocks(model):
            block.alone = place.step < first
            if place.step == first:
                block.copy_dense()
            block.shared_expert.requires_grad_(block.alone)
            block.experts.requires_grad_(not block.alone)
            block.gate.requires_grad_(not block.alone)

    def finish(self, model: nn.Module) -> None:
        for block in ternary_blocks(model):
            block.requires_grad_(True)
            block.alone = False
            if self.dense >= 1:
                nn.init.zeros_(block.experts.down_proj)


def ternary_blocks(model: nn.Module) -> list[TernaryBlock]:
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, TernaryBlock)]


class MoTESettings(Form):
    """dense: share of the steps before there are experts; 1 leaves the dense model. ternary: whether experts have three values."""

    dense: Share = 0.3
    ternary: bool = True


class MoTE(Architecture):
    """`model.experts` counts those beside the dense layer; their weights are probabilities, so that a router of one expert learns."""

    Settings = MoTESettings

    def config(self, vocabulary: TokenIds) -> Any:
        return MoTEConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=False)

    def parts(self) -> list[TrainingPart]:
        return [*([StraightThrough(ternary)] if self.settings.ternary else []), Upcycled(self.settings.dense)]

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape.model_copy(update={"active": 1}), {"dense": 0.5}


register(MoTEConfig, MoTEForCausalLM)
