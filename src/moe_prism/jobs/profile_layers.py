"""How much each layer's dropped slots cost in output quality: short runs with one layer alone at a budget, on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..elastic import attach
from ..elastic.rules.layer_budgets import budget_steps
from ..elastic.rules.threshold import dropped_energy
from ..frontier.allocation import greedy_path
from ..frontier.measure import LOGIT_ROWS, measure
from ..model import find_layers, load_to_run
from ..point import OperatingPoint, SlotRule
from ..progress import Update
from .solve_layer import PERM, WORKING

TYPICAL = 0.5  # the budget whose cost per unit of dropped energy stands for a layer where no more is known


def profile_runs(points: int) -> list[tuple[str, float]]:
    """(rule, budget) of what is run with every layer alone: the typical one, then `points` budgets evenly inside (0, 1) for the parts."""
    return [("threshold", TYPICAL), *(("product", (i + 1) / (points + 1)) for i in range(points))]


def alone_points(rule: str, budget: float, layers: int) -> list[OperatingPoint]:
    """Of every layer the point with it alone at a budget of slots, and the others full."""
    alone = [tuple(budget if i == j else 1.0 for j in range(layers)) for i in range(layers)]
    return [OperatingPoint(slots=SlotRule(rule=rule, layers=own, of="slots", control="none")) for own in alone]


def spaced(ids: Tensor, tokens: int) -> Tensor:
    """About so many tokens of windows ids [n, length], evenly spaced."""
    wanted = max(1, tokens // ids.shape[1])
    return ids[:: max(1, len(ids) // wanted)][:wanted]


class Profiler:
    """The whole model with its new neuron order, made elastic by what was fitted per layer (`units`)."""

    def __init__(self, where: Path | str, units: Sequence[dict[str, Tensor]], n_sub: int, gates: int) -> None:
        self.model = load_to_run(where)
        layers = find_layers(self.model)
        for layer, unit in zip(layers, units, strict=True):
            layer.permute(unit[PERM])
        tensors = [{k: v for k, v in unit.items() if k not in WORKING} for unit in units]
        self.elastic = attach(self.model, n_sub, gates=gates, tensors=tensors, layers=layers)

    def alone(self, rule: str, budget: float, ids: Tensor, update: Update) -> tuple[Tensor, int]:
        """(KL [L] to the full model in nats per token with that layer alone at `budget`, slots per token); ids: windows [n, length]."""
        points = alone_points(rule, budget, len(self.elastic.layers))
        measured = measure(self.model, ids, points, batch=max(1, LOGIT_ROWS // ids.shape[1]), progress=update)
        counter = self.elastic.layers[0].counter
        k = self.elastic.k or -(-counter.chosen // counter.tokens)  # the most of a token, whose router may choose fewer
        slots = k * self.elastic.layers[0].parts.n_sub
        return torch.tensor([found.quality.kl for found in measured], dtype=torch.float64), slots


def unit_cost(levels: Tensor, budget: float, loss: float) -> float:
    """KL per unit of dropped squared value of one layer; levels: its own (see `fit_cutoffs`)."""
    return loss / max(dropped_energy(levels, budget), 1e-30)


def loss_curve(levels: Tensor, profile: Sequence[tuple[float, float]], slots: int) -> list[float]:
    """KL with 1, 2, ... `slots` slots kept in one layer, from a few measured (budget, KL), budgets rising.

    The cost of a unit of dropped energy changes little with the budget where the KL changes by orders of magnitude, so the logarithm of
    that cost is what is interpolated, flat beyond the ends.
    """
    grid = [count / slots for count in range(1, slots)]
    known = [max(unit_cost(levels, budget, loss), 1e-30) for budget, loss in profile]
    costs = np.exp(np.interp(grid, [budget for budget, _ in profile], np.log(known)))
    return [*(float(c) * dropped_energy(levels, b) for c, b in zip(costs, grid, strict=True)), 0.0]


def plan_order(curves: Sequence[Sequence[float]]) -> list[int]:
    """The layer that gets the next slot per token, from nothing to all slots of every layer (see `budget_steps`).

    Every layer first gets one; then a hull-greedy allocation under the sum of the layers' losses, curves [L][slots].
    """
    path = greedy_path([[(count + 1, loss) for count, loss in enumerate(curve)] for curve in curves])
    steps = np.repeat(path.item, np.diff(path.costs).round().astype(int)).tolist()
    order = [*range(len(curves)), *steps]
    # a layer that nothing measurable is lost from gets its last slots last
    return order + [layer for layer, curve in enumerate(curves) for _ in range(len(curve) - order.count(layer))]


def budget_tensors(levels: Sequence[Tensor], profiles: Sequence[Sequence[tuple[float, float]]], slots: int) -> list[Tensor]:
    """`parts` of every layer, for the rule of that name, from each layer's own levels and measured (budget, KL)."""
    curves = [loss_curve(own, profile, slots) for own, profile in zip(levels, profiles, strict=True)]
    return budget_steps(plan_order(curves), len(levels))
