"""Quality and cost of operating points, measured together on held-out text."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..elastic import Elastic
from ..elastic.bind import Step, bind
from ..point import OperatingPoint
from .cost import Cost, measured_cost, resident_bytes

BATCH = 4  # windows that run together
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

    @classmethod
    def sum(cls, parts: Iterable[Quality]) -> Quality:
        """Of all tokens of several texts together."""
        return cls(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))

    def add(self, source: Tensor, logits: Tensor, target: Tensor) -> None:
        """source: log-probabilities [T, V] of the source model; logits [T, V]; target [T]."""
        log_p = logits.log_softmax(-1)
        self.tokens += len(target)
        self.nll += float(nn.functional.nll_loss(log_p, target, reduction="sum"))
        self.divergence += float((source.exp() * (source - log_p)).sum())
        self.agree += int((source.argmax(-1) == log_p.argmax(-1)).sum())


@dataclass(frozen=True)
class Measurement:
    """What was found of one point: its quality, its cost per token, and the expert bytes it has in memory."""

    quality: Quality
    cost: Cost
    resident_bytes: float
    domains: Mapping[str, Quality] = field(default_factory=dict)
    """Of each domain of the text, where it has any."""


@torch.no_grad()
def measure(
    model: Any,
    ids: Tensor,
    points: Sequence[OperatingPoint],
    *,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
    parts: Sequence[tuple[str, int]] = (),
    devices: int = 0,
) -> list[Measurement]:
    """Run every point over ids [n, length] against the full model. The source's log-probabilities exist for one batch at a time.

    parts: (domain, windows) in the order of ids; a batch never holds two. devices: of `Elastic.count`.
    """
    elastic: Elastic = model._moe_prism
    steps = [Step(bind(elastic, [point])) for point in points]
    parts = parts or [("", len(ids))]
    ends = list(accumulate(rows for _, rows in parts))
    qualities = [{name: Quality() for name, _ in parts} for _ in points]
    costs: list[_Sum] = [_Sum() for _ in points]
    stop = 0
    while stop < len(ids):
        place, start = bisect_right(ends, stop), stop
        stop = min(start + batch, ends[place])
        rows = ids[start:stop].to(model.device)
        target = rows[:, 1:].reshape(-1)
        with elastic.at(elastic.full_step, counting=False):
            source = logits_of(model, rows).log_softmax(-1)
        for step, quality, cost in zip(steps, qualities, costs, strict=True):
            with elastic.at(step), elastic.count(devices):
                quality[parts[place][0]].add(source, logits_of(model, rows), target)
                cost.add(measured_cost(elastic, step), rows.numel())
        if progress:
            progress(stop, len(ids))
    return [
        Measurement(
            Quality.sum(quality.values()), cost.mean(), resident_bytes(elastic, step), {d: q for d, q in quality.items() if d}
        )
        for quality, cost, step in zip(qualities, costs, steps, strict=True)
    ]


def logits_of(model: Any, rows: Tensor) -> Tensor:
    """[T, V] float32: predictions of tokens 1.. of every row."""
    return model(input_ids=rows, use_cache=False).logits[:, :-1].float().flatten(0, 1)  # type: ignore[no-any-return]


@dataclass
class _Sum:
    """Token-weighted mean of costs over batches."""

    total: tuple[float, ...] = ()
    tokens: int = 0

    def add(self, cost: Cost, tokens: int) -> None:
        row = astuple(cost)
        self.total = tuple(t + r * tokens for t, r in zip(self.total or (0.0,) * len(row), row, strict=True))
        self.tokens += tokens

    def mean(self) -> Cost:
        return Cost(*(t / self.tokens for t in self.total))
