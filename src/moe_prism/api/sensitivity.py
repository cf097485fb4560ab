"""How much each layer's dropped slots cost in output quality: short runs with one layer alone at a budget, on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..elastic import attach
from ..elastic.plan_ import plan_steps
from ..elastic.runtime import Setting
from ..elastic.threshold import dropped_energy
from ..frontier.allocation import greedy_path
from ..frontier.measure import measure
from ..model import find_layers, load_model
from .progress import Update

LOGIT_ROWS = 512  # tokens whose logits are held at a time: with a vocabulary of 150,000 some 2 GB
TYPICAL = 0.5  # the budget whose cost per unit of dropped energy stands for a layer


def profile_budgets(points: int) -> list[float]:
    """The budgets at which every layer is measured alone, evenly spaced inside (0, 1)."""
    return [(i + 1) / (points + 1) for i in range(points)]


class Profiler:
    """The whole model with its new neuron order, made elastic by what was fitted per layer (`units`)."""

    def __init__(self, where: Path | str, units: Sequence[dict[str, Tensor]], n_sub: int, gates: int) -> None:
        model = load_model(where, None if torch.cuda.is_available() else torch.float32)
        self.model = model.cuda() if torch.cuda.is_available() else model
        layers = find_layers(self.model)
        for layer, unit in zip(layers, units, strict=True):
            layer.permute(unit["perm"])
        tensors = [{k: v for k, v in unit.items() if k != "perm"} for unit in units]
        self.elastic = attach(self.model, n_sub, gates=gates, tensors=tensors, layers=layers)

    def alone(self, budget: float, ids: Tensor, update: Update) -> tuple[Tensor, int]:
        """(KL [L] to the full model in nats per token with that layer alone at `budget`, slots per token); ids: windows [n, length]."""
        count = len(self.elastic.layers)
        settings = [
            Setting(rule="threshold", layers=tuple(budget if i == j else 1.0 for j in range(count))) for i in range(count)
        ]
        measured = measure(self.model, self.elastic, ids, settings, batch=max(1, LOGIT_ROWS // ids.shape[1]), progress=update)
        counter = self.elastic.layers[0].counter
        slots = counter.chosen // counter.tokens * self.elastic.layers[0].plan.n_sub
        return torch.tensor([quality.kl for quality, _ in measured], dtype=torch.float64), slots


def unit_costs(levels: Tensor, budgets: Sequence[float], losses: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """KL per unit of dropped squared value of one layer at the wanted budgets, from a few measured ones.

    It changes slowly with the budget, much less than the KL itself, so its logarithm is interpolated, flat at the ends.
    levels: the layer's own (see `fit_levels`).
    """
    known = [max(loss, 1e-30) / max(dropped_energy(levels, b), 1e-30) for b, loss in zip(budgets, losses, strict=True)]
    return [float(c) for c in np.exp(np.interp(wanted, budgets, np.log(known)))]


def plan_order(levels: Sequence[Tensor], budgets: Sequence[float], losses: Sequence[Sequence[float]], slots: int) -> list[int]:
    """The layer that gets the next slot per token, from nothing to all slots of every layer (see `plan_steps`).

    Every layer first gets one. Then a hull-greedy allocation under the sum of the layers' losses, each predicted for every number of slots
    from its profile: losses [L][budgets].
    """
    grid = [count / slots for count in range(1, slots)]
    curves = []
    for own, measured in zip(levels, losses, strict=True):
        costs = unit_costs(own, budgets, measured, grid)
        curves.append([*(c * dropped_energy(own, b) for c, b in zip(costs, grid, strict=True)), 0.0])
    path = greedy_path([[(count + 1, loss) for count, loss in enumerate(curve)] for curve in curves])
    steps = np.repeat(path.item, np.diff(path.costs).round().astype(int)).tolist()
    order = [*range(len(levels)), *steps]
    # a layer that nothing measurable is lost from gets its last slots last
    return order + [layer for layer in range(len(levels)) for _ in range(slots - order.count(layer))]


def plan_tensors(
    levels: Sequence[Tensor], budgets: Sequence[float], losses: Sequence[Sequence[float]], slots: int
) -> list[Tensor]:
    """`plan` of every layer, for the rule of that name."""
    return plan_steps(plan_order(levels, budgets, losses, slots), len(levels))
