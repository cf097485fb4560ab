"""Selective Sinkhorn routing: in a few steps of training, an even transport plan chooses the experts in place of softmax.

In those steps the routing weights are those of the plan with row sums 1 and column sums T / E, in which tokens and experts are matched at
the least cost with entropy. In the others the logits carry Gaussian noise. No loss asks for balance. What comes out is an ordinary OLMoE
checkpoint, routed by softmax. Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import OlmoeConfig

from ..schema.common import Amount, Form, Share
from .base import Architecture, StepPlace, TokenIds, TrainingPart, olmoe_keys, routers

PURPOSE, PURPOSE_OF_STEP = 2, 4


@torch.no_grad()
def scalings(scores: Tensor, temperature: float, iterations: int, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(u [T], v [E]) with diag(u) exp(scores / temperature) diag(v) of row sums 1 and column sums T / E, by Sinkhorn's alternation.

    scores [T, E]; their row maxima are taken off first, which moves u alone. Stops when column sums are right to the tolerance.
    """
    kernel = _kernel(scores, temperature)
    share, v = len(kernel) / kernel.shape[1], torch.ones(kernel.shape[1])
    for _ in range(iterations):
        u = 1 / (kernel @ v).clamp(min=1e-30)
        columns = kernel.t() @ u
        if float(((columns * v) / share - 1).abs().max()) < tolerance:
            break
        v = share / columns.clamp(min=1e-30)
    return 1 / (kernel @ v).clamp(min=1e-30), v


def plan(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """The plan [T, E]; its gradient flows through the scores, not through what balances them."""
    u, v = scalings(scores.detach(), temperature, iterations)
    return u[:, None] * _kernel(scores, temperature) * v


def _kernel(scores: Tensor, temperature: float) -> Tensor:
    scaled = scores.float() / temperature
    return (scaled - scaled.detach().amax(-1, keepdim=True)).exp()


class SelectiveSinkhorn(TrainingPart):
    """What routers of OLMoE's class say while they are trained."""

    def __init__(self, settings: SinkhornSettings) -> None:
        self.settings, self.balances, self.generator = settings, False, torch.Generator()

    def start(self, model: nn.Module) -> None:
        for router in routers(model):
            router.register_forward_hook(self._route)

    def begin(self, model: nn.Module, place: StepPlace) -> None:
        self.generator = place.generator(PURPOSE)
        drawn = torch.rand((), generator=place.generator(PURPOSE_OF_STEP, whole=True))
        self.balances = bool(drawn < self.settings.share)

    def _route(
        self, router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if not router.training:
            return None
        logits, weights, ids = output
        if self.balances:
            gates = plan(logits, self.settings.temperature, self.settings.iterations)
        elif self.settings.noise:
            gates = (logits + self.settings.noise * torch.randn(logits.shape, generator=self.generator)).float().softmax(-1)
        else:
            return None
        weights, ids = gates.topk(ids.shape[1], -1)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), ids


class SinkhornSettings(Form):
    """share: of the steps that are balanced; temperature, iterations: of the plan; noise: of the logits in the other steps."""

    share: Share = 0.01
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    iterations: Annotated[int, Field(ge=1, le=10_000)] = 50
    noise: Amount = 0.1


class Sinkhorn(Architecture):
    """OLMoE's class with weights of chosen experts that add up to one. Give the recipe `balance: 0.0`: no loss is needed."""

    Settings = SinkhornSettings

    def config(self, vocabulary: TokenIds) -> Any:
        return OlmoeConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=True)

    def parts(self) -> list[TrainingPart]:
        return [SelectiveSinkhorn(self.settings)]

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape, {"share": 0.5}
