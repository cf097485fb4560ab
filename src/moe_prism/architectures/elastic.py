"""A mixture of experts that is trained to lose blocks of its experts: ours.

Beside the full model, every step runs the same text with fewer sub-experts: each token has a budget that is drawn, and of a layer's slots
those stay whose routing weight x output norm passes the cutoff of that budget. The loss adds KL from the full model, which is held
fixed, to the cut one. So the threshold rule of `moe-prism refactor` finds a model that knows it. Blocks are runs of neighbouring neurons:
refactor with `--solver contiguous` to keep them. What comes out is an ordinary OLMoE checkpoint.

Shapes: S chosen pairs of a token and an expert, f neurons of an expert, N sub-experts of m neurons, T tokens, d hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig

from ..errors import UsageError
from ..schema.common import Amount, Blocks, Budget, Form
from .base import FILTER, Architecture, ChosenPairs, StepSeen, TokenIds, TrainingPart, olmoe_keys
from .parts import experts_of

PURPOSE = 1


class ElasticSettings(Form):
    """sub_experts: blocks of an expert. least, most: budgets are drawn evenly between them. weight: of the KL; 0 is plain training."""

    sub_experts: Blocks = 4
    least: Budget = 0.1
    most: Budget = 1.0
    weight: Amount = 1.0
    normalise: bool = True


class Budgets(TrainingPart):
    """The second pass of a step, below full budget."""

    def __init__(self, settings: ElasticSettings) -> None:
        self.settings, self.sub_experts, self.weight = settings, settings.sub_experts, settings.weight
        self.budgets: Tensor | None = None

    def start(self, model: nn.Module) -> None:
        if self.weight:
            for module in experts_of(model):
                module.__dict__[FILTER] = self._kept

    def loss(self, seen: StepSeen) -> Tensor | None:
        if not self.weight:
            return None
        drawn = torch.rand(seen.ids.numel(), generator=seen.place.generator(PURPOSE))
        least, most = self.settings.least, self.settings.most
        self.budgets = least + (most - least) * drawn
        try:
            cut = seen.again().flatten(0, 1).float().log_softmax(-1)
        finally:
            self.budgets = None
        full = seen.logits.detach().flatten(0, 1).float().log_softmax(-1)
        return self.weight * nn.functional.kl_div(cut, full, reduction="batchmean", log_target=True)

    def _kept(self, module: nn.Module, a: Tensor, pairs: ChosenPairs) -> Tensor:
        """a [S, f] without the blocks that their tokens' budgets drop."""
        if self.budgets is None:
            return a
        down: Any = module.down_proj
        norms = block_norms(a.detach(), down.detach(), pairs, self.sub_experts)
        values = pairs.weight.detach().float().abs()[:, None] * norms
        kept = values >= cutoffs(values, self.budgets)[pairs.token, None]
        return a * kept.to(a.dtype).repeat_interleave(a.shape[1] // self.sub_experts, 1)


def block_norms(a: Tensor, down: Tensor, pairs: ChosenPairs, blocks: int) -> Tensor:
    """Norms [S, N] of what each block of a [S, f] adds to the output through its expert's down [E, d, f]."""
    experts, hidden, width = down.shape
    parts = down.view(experts, hidden, blocks, width // blocks).permute(0, 2, 3, 1)
    grams = parts @ parts.mT  # [E, N, m, m]: |W a|^2 = a' (W' W) a, and m is smaller than d
    found = a.new_empty(len(a), blocks)
    for e, (low, high) in enumerate(pairs.spans):
        own = a[low:high].view(high - low, blocks, width // blocks).transpose(0, 1)
        found[low:high] = ((own @ grams[e]) * own).sum(-1).clamp(min=0).sqrt().t()
    return found


def cutoffs(values: Tensor, budgets: Tensor) -> Tensor:
    """For every token's budget [T] the value that this share of a batch's slots [S, N] reaches."""
    ranked = values.flatten().sort(descending=True).values
    return ranked[((budgets * len(ranked)).ceil().long() - 1).clamp(0, len(ranked) - 1)]


class ElasticTrained(Architecture):
    """OLMoE's class, trained by the next token and by KL at drawn budgets."""

    Settings = ElasticSettings

    def config(self, vocabulary: TokenIds) -> Any:
        if self.shape.width % self.settings.sub_experts:
            raise UsageError(
                f"model.width {self.shape.width} is no multiple of settings.sub_experts {self.settings.sub_experts}",
                "give a divisor of the width",
            )
        if self.settings.least > self.settings.most:
            raise UsageError(
                f"settings.least {self.settings.least} is above settings.most {self.settings.most}",
                "give no more than settings.most",
            )
        return OlmoeConfig(**olmoe_keys(self.shape, vocabulary), norm_topk_prob=self.settings.normalise)

    def parts(self) -> list[TrainingPart]:
        return [Budgets(self.settings)]
