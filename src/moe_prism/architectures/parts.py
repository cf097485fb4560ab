"""Parts of a training that several architectures share: losses of routers, schedules for k, frozen parameters, fewer values of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .base import WEIGHTS, LayerRouting, StepPlace, StepSeen, TrainingPart, routers


class RouterLosses(TrainingPart):
    """Load balance (Switch, arXiv 2101.03961, eq. 4, over k choices) and z-loss (ST-MoE, arXiv 2202.08906, eq. 5); means over layers."""

    def __init__(self, balance: float, z: float) -> None:
        self.balance, self.z = balance, z

    def loss(self, seen: StepSeen) -> Tensor | None:
        if not seen.routings or not (self.balance or self.z):
            return None
        terms = [self.balance * even(r) + self.z * r.logits.float().logsumexp(-1).square().mean() for r in seen.routings]
        return torch.stack(terms).mean()


def even(routing: LayerRouting) -> Tensor:
    """C x sum of (share of the choices that fall on a column) x (its mean probability): 1 where both are even."""
    chosen = routing.chosen.float()
    share = chosen.mean(0) / chosen.sum(1).mean().clamp(min=1e-9)
    found: Tensor = routing.logits.shape[1] * (share * routing.logits.float().softmax(-1).mean(0)).sum()
    return found


class CountSchedule(TrainingPart):
    """k of every layer by the share of training that is gone. counts(layer, layers, share) -> k."""

    def __init__(self, counts: Callable[[int, int, float], int]) -> None:
        self.counts = counts

    def begin(self, model: nn.Module, place: StepPlace) -> None:
        self._set(model, place.share)

    def finish(self, model: nn.Module) -> None:
        self._set(model, 1.0)

    def _set(self, model: nn.Module, share: float) -> None:
        found = routers(model)
        for layer, router in enumerate(found):
            router.top_k = self.counts(layer, len(found), share)  # type: ignore[assignment]


class Frozen(TrainingPart):
    """Parameters whose names match a pattern are not trained."""

    def __init__(self, pattern: str) -> None:
        self.pattern = re.compile(pattern)

    def start(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if self.pattern.search(name):
                parameter.requires_grad_(False)


class StraightThrough(TrainingPart):
    """Experts compute with `rounded` weights, and the gradient passes as if they were the weights themselves (arXiv 1308.3432).

    When training is over, the weights are the rounded ones.
    """

    def __init__(self, rounded: Callable[[Tensor], Tensor]) -> None:
        self.rounded = rounded

    def start(self, model: nn.Module) -> None:
        for module in experts_of(model):
            module.__dict__[WEIGHTS] = self._through

    def finish(self, model: nn.Module) -> None:
        with torch.no_grad():
            for module in experts_of(model):
                module.__dict__.pop(WEIGHTS, None)
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(self.rounded(parameter))

    def _through(self, weight: Tensor) -> Tensor:
        return weight + (self.rounded(weight) - weight).detach()


def experts_of(model: nn.Module) -> Sequence[nn.Module]:
    """The modules that hold stacked experts, in the order of the layers."""
    return [m for m in model.modules() if sum(p.ndim == 3 for p in m.parameters(recurse=False)) >= 2]
