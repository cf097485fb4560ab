"""MoE++ (arXiv 2410.07348): experts that give nothing, a copy or a constant, and routers that see the scores of the layer before.

Shapes: T tokens, d hidden, F usual experts, Z of the others, C = F + Z, k choices per token.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from huggingface_hub.dataclasses import strict
from pydantic import Field
from torch import Tensor, nn
from transformers import OlmoeConfig

from ..schema.common import Amount, Form
from .base import Architecture, StepSeen, TokenIds, TrainingPart, olmoe_keys, register, routers
from .olmoe import Carried, OwnBlock, OwnOlmoe, chosen


@strict
class MoEPlusPlusConfig(OlmoeConfig):
    """OLMoE's, with counts of zero, copy and constant experts, and whether routers add what the last one said."""

    model_type = "prism_moe_plus_plus"

    zero_experts: int = 1
    copy_experts: int = 1
    constant_experts: int = 2
    gating_residual: bool = True


class ResidualRouter(nn.Module):
    """logits = W x + G (the logits of the layer before), from the second layer on."""

    carried: Carried

    def __init__(self, config: MoEPlusPlusConfig, index: int, carried: Carried) -> None:
        super().__init__()
        columns = config.num_experts + config.zero_experts + config.copy_experts + config.constant_experts
        self.top_k, self.normalise, self.index = config.num_experts_per_tok, config.norm_topk_prob, index
        self.__dict__["carried"] = carried
        self.weight = nn.Parameter(torch.zeros(columns, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        self.residual = nn.Parameter(torch.zeros(columns, columns)) if config.gating_residual and index else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, C], weights [T, k], ids [T, k])."""
        logits = nn.functional.linear(x, self.weight)
        before = self.carried.take(self.index)
        if self.residual is not None and before is not None:
            logits = logits + nn.functional.linear(before, self.residual)
        self.carried.value = logits
        return logits, *chosen(logits, self.top_k, self.normalise)


class PlusBlock(OwnBlock):
    """After the F usual experts come the zero ones, the copies, and the constants a x + b v, (a, b) = softmax(W x), of each its own."""

    def __init__(self, config: MoEPlusPlusConfig, index: int, carried: Carried) -> None:
        super().__init__(config, ResidualRouter(config, index, carried))
        self.first_copy = config.num_experts + config.zero_experts
        self.first_constant = self.first_copy + config.copy_experts
        self.constants = nn.Parameter(torch.zeros(config.constant_experts, config.hidden_size))
        self.mix = nn.Parameter(torch.zeros(config.constant_experts, 2, config.hidden_size))

    def beside(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        copied = (ids >= self.first_copy) & (ids < self.first_constant)
        out: Tensor = (weights * copied).sum(-1, keepdim=True) * x
        if len(self.constants):
            shares = torch.einsum("cpd,td->tcp", self.mix, x).softmax(-1)
            there = torch.zeros(len(x), self.first_constant + len(self.constants), dtype=weights.dtype, device=x.device)
            own = there.scatter_add(1, ids, weights)[:, self.first_constant :]
            out = out + (own * shares[:, :, 0]).sum(-1, keepdim=True) * x + (own * shares[:, :, 1]) @ self.constants
        return out


class MoEPlusPlusForCausalLM(OwnOlmoe):
    """OLMoE with such blocks."""

    config_class = MoEPlusPlusConfig

    def block(self, config: MoEPlusPlusConfig, index: int, carried: Carried) -> nn.Module:
        return PlusBlock(config, index, carried)


class UnevenBalance(TrainingPart):
    """beta C / k x sum of eta f P: eta is 1 for usual experts and tau for the others, which therefore get 1 / tau of the tokens (eq. 9)."""

    def __init__(self, weight: float, tau: float, experts: int) -> None:
        self.weight, self.tau, self.experts = weight, tau, experts

    def loss(self, seen: StepSeen) -> Tensor | None:
        if not self.weight:
            return None
        terms = []
        for routing in seen.routings:
            eta = torch.full((routing.logits.shape[1],), self.tau)
            eta[: self.experts] = 1.0
            share = routing.chosen.float().mean(0) / routing.ids.shape[1]
            terms.append(len(eta) * (eta * share * routing.logits.float().softmax(-1).mean(0)).sum())
        return self.weight * torch.stack(terms).mean()


class Capacity(TrainingPart):
    """In training a column takes its share of a batch's choices, times gamma, and what chose it beyond that passes through (eq. 8).

    The share of a usual expert is tau / (tau F + Z), that of another 1 / (tau F + Z). Those of the least weight are left out. The paper
    counts tokens; choices are counted here, of which a token makes k.
    """

    def __init__(self, gamma: float, tau: float, experts: int) -> None:
        self.gamma, self.tau, self.experts = gamma, tau, experts

    def start(self, model: nn.Module) -> None:
        for router in routers(model):
            router.register_forward_hook(self._limit)

    def _limit(
        self, router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if not router.training:
            return None
        logits, weights, ids = output
        shares = torch.ones(logits.shape[1])
        shares[: self.experts] = self.tau
        limits = (self.gamma * ids.numel() * shares / shares.sum()).floor()
        return logits, weights * within(weights, ids, limits), ids


def within(weights: Tensor, ids: Tensor, limits: Tensor) -> Tensor:
    """[T, k] bool: choices of ids [T, k] that are among the limits[c] of their column c with the largest weights [T, k]."""
    order = weights.flatten().argsort(descending=True, stable=True)
    ranked = ids.flatten()[order]
    turn = nn.functional.one_hot(ranked, len(limits)).cumsum(0).gather(1, ranked[:, None])[:, 0]
    kept = torch.empty(ids.numel(), dtype=torch.bool)
    kept[order] = turn <= limits[ranked]
    return kept.view_as(ids)


class MoEPlusPlusSettings(Form):
    """zeros, copies, constants: how many of each. tau: below 1 more tokens go to them. residual: whether routers see the last one's scores.

    balance: weight of the loss here; the recipe's is 0 then. capacity: gamma, of what columns take of a batch in training (the paper's is
    1.1); none without it.
    """

    zeros: Annotated[int, Field(ge=0, le=1024)] = 1
    copies: Annotated[int, Field(ge=0, le=1024)] = 1
    constants: Annotated[int, Field(ge=0, le=1024)] = 2
    tau: Annotated[float, Field(gt=0, le=1)] = 0.75
    residual: bool = True
    balance: Amount = 0.01
    capacity: Annotated[float, Field(gt=0, le=1000)] | None = None


class MoEPlusPlus(Architecture):
    """`model.experts` counts the usual experts. What a column takes is limited in training alone: a text is not changed by its batch."""

    Settings = MoEPlusPlusSettings

    def config(self, vocabulary: TokenIds) -> Any:
        s = self.settings
        return MoEPlusPlusConfig(
            **olmoe_keys(self.shape, vocabulary), norm_topk_prob=True,
            zero_experts=s.zeros, copy_experts=s.copies, constant_experts=s.constants, gating_residual=s.residual,
        )  # fmt: skip

    def parts(self) -> list[TrainingPart]:
        s, experts = self.settings, self.shape.experts
        limits = [] if s.capacity is None else [Capacity(s.capacity, s.tau, experts)]
        return [*limits, UnevenBalance(s.balance, s.tau, experts)]


register(MoEPlusPlusConfig, MoEPlusPlusForCausalLM)
