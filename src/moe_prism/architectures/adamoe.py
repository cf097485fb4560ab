"""AdaMoE (arXiv 2406.13233): experts that do nothing stand beside the true ones, so that a token takes as many true ones as it needs.

Shapes: T tokens, E true experts, m null ones, k choices per token.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from huggingface_hub.dataclasses import strict
from pydantic import Field
from torch import Tensor, nn
from transformers import OlmoeConfig

from ..errors import UsageError
from ..schema.common import Amount, Form
from .base import Architecture, StepSeen, TokenIds, TrainingPart, olmoe_keys, register
from .olmoe import Carried, OwnBlock, OwnOlmoe

LATE = 0.5  # of the steps
NOISE = 0.01  # of the spread of a copied row: no two columns are the same


@strict
class AdaMoEConfig(OlmoeConfig):
    """OLMoE's, with m null experts. A token chooses num_experts_per_tok of all."""

    model_type = "prism_adamoe"

    null_experts: int = 0


class NullRouter(nn.Module):
    """Softmax over E + m columns, the k largest; those of null ones weigh nothing.

    Weights of chosen true experts are made to add up to one. Where the model that it was made of does not do so, they are what they were
    there: probabilities among the true experts.
    """

    def __init__(self, config: AdaMoEConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts, self.normalise = config.num_experts_per_tok, config.num_experts, config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts + config.null_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, E + m], weights [T, k], ids [T, k]); ids from E on are null."""
        logits = nn.functional.linear(x, self.weight)
        p = logits.float().softmax(-1)
        weights, ids = p.topk(self.top_k, -1)
        weights = weights * (ids < self.num_experts)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        elif p.shape[1] > self.num_experts:
            weights = weights / p[:, : self.num_experts].sum(-1, keepdim=True).clamp(min=1e-20)
        return logits, weights.to(logits.dtype), ids


class AdaMoEForCausalLM(OwnOlmoe):
    """OLMoE with routers that may choose nothing."""

    config_class = AdaMoEConfig

    def block(self, config: AdaMoEConfig, index: int, carried: Carried) -> nn.Module:
        return OwnBlock(config, NullRouter(config))


class NullBalance(TrainingPart):
    """alpha (E + m) x sum of f P, where every null expert counts as the mean of all of them: they need no balance among each other."""

    def __init__(self, weight: float, experts: int, late: float | None = None) -> None:
        self.weights, self.experts = (weight, weight if late is None else late), experts

    def loss(self, seen: StepSeen) -> Tensor | None:
        weight = self.weights[int(seen.place.share >= LATE)]
        if not weight:
            return None
        terms = []
        for routing in seen.routings:
            share = routing.chosen.float().mean(0)
            null = share[self.experts :]
            share = torch.cat([share[: self.experts], null.mean().expand(len(null)) if len(null) else null])
            terms.append(len(share) * (share * routing.logits.float().softmax(-1).mean(0)).sum())
        return weight * torch.stack(terms).mean()


class AdaMoESettings(Form):
    """nulls: experts that do nothing, m; with even use a token has k E / (E + m) true ones.

    balance: weight of the loss here, and late_balance that of the second half of the steps, the same where it is not given; the recipe's
    is 0 then. choices: k, in the place of the sizes' active experts, for a model that training begins from.
    """

    nulls: Annotated[int, Field(ge=0, le=4096)] = 16
    balance: Amount = 0.01
    late_balance: Amount | None = None
    choices: Annotated[int, Field(ge=1, le=4096)] | None = None


class AdaMoE(Architecture):
    """`model.active` counts true and null choices. Training can begin from any model of OLMoE's class."""

    Settings = AdaMoESettings
    adopts = True

    def config(self, vocabulary: TokenIds) -> Any:
        keys = olmoe_keys(self.shape, vocabulary) | self._choices()
        return AdaMoEConfig(**keys, norm_topk_prob=True, null_experts=self.settings.nulls)

    def adopt(self, source: Any, seed: int) -> Any:
        """The columns of null experts are copies of true ones, so that as many tokens choose them at once."""
        if type(source.config) is not OlmoeConfig:
            raise UsageError(f"a '{source.config.model_type}' cannot become an AdaMoE", "start from a model of OLMoE's class")
        keys = {key: value for key, value in source.config.to_dict().items() if key not in ("model_type", "architectures")}
        config = AdaMoEConfig(**keys | self._choices(), null_experts=self.settings.nulls)
        model = AdaMoEForCausalLM(config)
        state, generator = dict(source.state_dict()), torch.Generator().manual_seed(seed)
        for name in [name for name in state if name.endswith(".mlp.gate.weight")]:
            true = state[name]
            turns = [torch.randperm(len(true), generator=generator) for _ in range(-(-config.null_experts // len(true)))]
            null = true[torch.cat([torch.empty(0, dtype=torch.long), *turns])[: config.null_experts]]
            drawn = torch.randn(null.shape, generator=generator) * NOISE * true.std()
            state[name] = torch.cat([true, null + drawn])
        model.load_state_dict(state)
        model.generation_config = source.generation_config
        return model.eval()

    def _choices(self) -> dict[str, int]:
        k = self.settings.choices or self.shape.active
        if k > self.shape.experts + self.settings.nulls:
            raise UsageError(
                f"a token cannot choose {k} of {self.shape.experts} true and {self.settings.nulls} null experts", "lower k"
            )
        return {"num_experts_per_tok": k}

    def parts(self) -> list[TrainingPart]:
        s = self.settings
        return [NullBalance(s.balance, self.shape.experts, s.late_balance)]

    @classmethod
    def example(cls) -> tuple[Any, dict[str, Any]]:
        shape, _ = super().example()
        return shape, {"nulls": 3}


register(AdaMoEConfig, AdaMoEForCausalLM)
