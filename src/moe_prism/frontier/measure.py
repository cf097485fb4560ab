"""Quality and cost of operating points, measured together on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..elastic import Elastic
from ..elastic.runtime import Setting
from .cost import Cost, measured_cost

LOGIT_ROWS = 512  # tokens whose logits are held at a time: with a vocabulary of 150,000 some 2 GB


@dataclass
class Quality:
    """Sums over predicted tokens; `ppl`, `kl` (mean KL(source || point) in nats) and `top1_agreement` are the measures."""

    tokens: int = 0
    nll: float = 0.0
    divergence: float = 0.0
    agree: int = 0

    @property
    def ppl(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def kl(self) -> float:
        return max(0.0, self.divergence / self.tokens)

    @property
    def top1_agreement(self) -> float:
        return self.agree / self.tokens

    def add(self, source: Tensor, logits: Tensor, target: Tensor) -> None:
        """source: log-probabilities [T, V] of the source model; logits [T, V]; target [T]."""
        log_p = logits.log_softmax(-1)
        self.tokens += len(target)
        self.nll += float(nn.functional.nll_loss(log_p, target, reduction="sum"))
        self.divergence += float((source.exp() * (source - log_p)).sum())
        self.agree += int((source.argmax(-1) == log_p.argmax(-1)).sum())


@torch.no_grad()
def measure(
    model: Any,
    elastic: Elastic,
    ids: Tensor,
    settings: Sequence[Setting],
    *,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
    installs: Sequence[Callable[[], AbstractContextManager[object]]] | None = None,
) -> list[tuple[Quality, Cost]]:
    """Run every setting over ids [n, length] against the full model. The source's log-probabilities exist for one batch at a time.

    installs: a context manager per setting, entered around its run of every batch (None: nothing to install).
    """
    around = installs or [nullcontext] * len(settings)
    qualities = [Quality() for _ in settings]
    costs: list[_Sum] = [_Sum() for _ in settings]
    before, counting = elastic.setting, elastic.counting
    try:
        for start in range(0, len(ids), batch):
            rows = ids[start : start + batch].to(model.device)
            target = rows[:, 1:].reshape(-1)
            elastic.setting = Setting()
            source = _logits(model, rows).log_softmax(-1)
            for setting, install, quality, cost in zip(settings, around, qualities, costs, strict=True):
                elastic.setting = setting
                elastic.reset_counters()
                with install():
                    quality.add(source, _logits(model, rows), target)
                cost.add(measured_cost(elastic, setting), rows.numel())
            if progress:
                progress(min(start + batch, len(ids)), len(ids))
    finally:
        elastic.setting, elastic.counting = before, counting
    return [(q, c.mean()) for q, c in zip(qualities, costs, strict=True)]


def _logits(model: Any, rows: Tensor) -> Tensor:
    """[T, V] float32: predictions of tokens 1.. of every row."""
    return model(input_ids=rows, use_cache=False).logits[:, :-1].float().flatten(0, 1)  # type: ignore[no-any-return]


@dataclass
class _Sum:
    """Token-weighted mean of costs over batches."""

    total: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    tokens: int = 0

    def add(self, cost: Cost, tokens: int) -> None:
        row = (cost.active_expert_params, cost.active_expert_bytes, cost.flops_per_token, cost.k_slots)
        self.total = tuple(t + r * tokens for t, r in zip(self.total, row, strict=True))
        self.tokens += tokens

    def mean(self) -> Cost:
        return Cost(*(t / self.tokens for t in self.total))
