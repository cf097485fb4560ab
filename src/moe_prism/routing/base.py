"""The contract of a routing policy. Shapes: T tokens, k experts per token, L MoE layers, P plans.

A policy sees what the router chose and says which of it is computed. It never sees more than that: no scores of other experts, no group
limits, no selection bias. So it works behind every router, whatever its score function, and what the router does before is untouched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from .plan import SkipPlan

PlanIndex = int | Tensor
"""Which plan of a policy: one for all tokens, or one per token [T] (int64)."""


class Column:
    """A number, or one per routing rank, for every plan and layer; on a device it is stored once."""

    def __init__(self, rows: Sequence[Sequence[Sequence[float]]]) -> None:
        """rows [P][L][1 or k]."""
        self._rows = torch.tensor(rows, dtype=torch.float32)
        self._on = {self._rows.device: self._rows}

    def at(self, layer: int, level: PlanIndex, device: torch.device) -> Tensor:
        """[1 or k] of one plan, or [T, 1 or k] of one per token."""
        if device not in self._on:
            self._on[device] = self._rows.to(device)
        own = self._on[device][:, layer]
        return own[level] if isinstance(level, int) else own[level.reshape(-1).to(device)]

    def of_plan(self, plan: int, layer: int) -> list[float]:
        """The same as Python numbers, without waiting for any device."""
        return self._rows[plan, layer].tolist()


class RoutingPolicy(ABC):
    """Made from one or more plans of the same policy; `level` chooses among them, per call or per token. Holds no state of a batch."""

    parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the plan's parameters it reads."""
    depends_on_batch: ClassVar[bool] = False
    """Whether a token's experts depend on the other tokens of the batch."""

    def __init__(self, plans: Sequence[SkipPlan]) -> None:
        """Raises UsageError where plans differ in layers or in keep_mass, or lack a parameter."""
        if not plans:
            raise UsageError("a routing policy was given no plan", "give at least one")
        if len({len(plan.layers) for plan in plans}) > 1 or len({plan.keep_mass for plan in plans}) > 1:
            raise UsageError("plans of one policy differ in layers or in keep_mass", "make them for the same model and setting")
        self.plans = tuple(plans)
        self.keep_mass = bool(plans[0].keep_mass)
        self.counts = Column([[[float(n)] for n in plan.layers] for plan in plans])
        for name in self.parameters:
            missing = [plan for plan in plans if name not in plan.parameters]
            if missing:
                raise UsageError(f"a plan has no parameter '{name}'", "make it with `moe-prism skip`")
        self._columns = {name: Column([plan.parameters[name] for plan in plans]) for name in self.parameters}
        self._neutral: dict[tuple[int, int, int], bool] = {}

    def column(self, name: str) -> Column:
        return self._columns[name]

    def check_level(self, level: PlanIndex) -> None:
        """UsageError for a plan that does not exist. Levels on a GPU are not asked for."""
        if isinstance(level, Tensor):
            if level.device.type != "cpu" or not level.numel():
                return
            low, high = int(level.min()), int(level.max())
        else:
            low = high = level
        if low < 0 or high >= len(self.plans):
            raise UsageError(f"there is no plan {low if low < 0 else high}", f"give a level from 0 to {len(self.plans) - 1}")

    def is_neutral(self, layer: int, level: PlanIndex, k: int) -> bool:
        """Whether nothing can be skipped. Never waits for a GPU: levels there count as all plans."""
        if isinstance(level, int):
            rows: Sequence[int] = (level,)
        elif level.device.type == "cpu":
            rows = torch.unique(level).tolist()
        else:
            rows = range(len(self.plans))
        return all(self._row_is_neutral(row, layer, k) for row in rows)

    def _row_is_neutral(self, row: int, layer: int, k: int) -> bool:
        key = (row, layer, k)
        if key not in self._neutral:
            self._neutral[key] = self.keeps_all(row, layer, k)
        return self._neutral[key]

    def keeps_all(self, plan: int, layer: int, k: int) -> bool:
        """Whether a plan skips nothing in a layer; here by its count alone."""
        return self.counts.of_plan(plan, layer)[0] >= k

    @abstractmethod
    def kept(self, ranked: Tensor, layer: int, level: PlanIndex) -> Tensor:
        """keep [T, k] bool, from a token's routing weights ranked [T, k], largest first; -1 where the router chose no expert.

        The first is always kept; a token at a plan that `keeps_all` keeps everything.
        """

    def __call__(self, index: Tensor, weight: Tensor, layer: int, level: PlanIndex = 0) -> tuple[Tensor, Tensor]:
        """index, weight [T, k] of the router (-1: no expert) -> the same with id -1 and weight 0 where an expert is skipped.

        The very same tensors where nothing can be skipped. Ranks are by |weight|, equal ones in the router's order. Nothing is read back
        from a GPU.
        """
        tokens, k = index.shape
        if isinstance(level, Tensor) and level.numel() != tokens:
            raise UsageError(f"{level.numel()} levels for {tokens} tokens", "give one per token of the flattened batch")
        if self.is_neutral(layer, level, k):
            return index, weight
        chosen = index >= 0
        size = weight.float().abs()
        ranked, order = size.masked_fill(~chosen, -1.0).sort(dim=1, descending=True, stable=True)
        keep = torch.zeros_like(chosen).scatter_(1, order, self.kept(ranked, layer, level)) & chosen
        return index.masked_fill(~keep, -1), self._weights(weight, size.masked_fill(~chosen, 0.0), keep)

    def _weights(self, weight: Tensor, size: Tensor, keep: Tensor) -> Tensor:
        if self.keep_mass:
            full, left = size.sum(1, keepdim=True), size.masked_fill(~keep, 0.0).sum(1, keepdim=True)
            scale = (full / left).masked_fill(left <= 0, 1.0)  # exactly 1 for a token that keeps everything
            weight = (weight.float() * scale).to(weight.dtype)
        return weight.masked_fill(~keep, 0.0)


def ranks(ranked: Tensor) -> Tensor:
    """0, 1, ... k - 1 as [k], to compare with counts."""
    return torch.arange(ranked.shape[1], device=ranked.device)


def fit_dial(mean_at: Callable[[float], float], mean: float, *, steps: int = 40) -> float:
    """The dial in [0, 1] at which `mean_at` (falling) reaches `mean`, by bisection; the largest dial that keeps at least that many."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) >= mean else (low, middle)
    return low


def mean_kept(policy: RoutingPolicy, samples: Sequence[Tensor]) -> float:
    """Experts per token and layer that a policy of one plan keeps of routing weights [S, k] per layer, largest first."""
    share = [policy.kept(ranked, layer, 0).sum(1).double().mean() for layer, ranked in enumerate(samples)]
    return float(torch.stack(share).mean())
