"""Everything that is fitted for one layer: neuron order, predictor, levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..calibrate.statistics import LayerStatistics
from ..elastic import LayerPlan
from ..elastic import ridge as ridge_scorer
from ..elastic.threshold import fit_levels
from ..model import MoELayer
from ..partition import gates as gate_choices
from ..partition import order_gates, solvers
from ..partition.parallel import solve_layer
from ..partition.weights import weight_fallback
from .calibration import STARVED


def solve(layer: MoELayer, statistics: LayerStatistics, options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of one layer whose weights are loaded; the weights are left in the new order.

    tensors: perm [E, f] int32, ridge, levels. facts: experts, width, cost_share (mean), starved experts.
    """
    samples, starved = _samples(statistics)
    mass = [layer.activations(e, x).abs().float().numpy() for e, x in enumerate(samples)]
    dropped = options.dropped or options.n_sub - 1
    partitions = solve_layer(
        dict(enumerate(mass)), options.n_sub, dropped, solvers.get(options.solver), layer=layer.index, seed=options.seed
    )
    orders = {e: p.perm for e, p in partitions.items()}
    for e in starved:
        orders[e] = weight_fallback(_rows(layer.gate, e), layer.up[e].float().numpy(), options.n_sub, options.seed).perm
    choice = gate_choices.get(options.gate_choice)
    down = layer.down.float().norm(dim=1).numpy()  # [E, f]
    perm = np.stack([order_gates(m, orders[e], options.n_sub, options.gates, choice, down[e]) for e, m in enumerate(mass)])
    layer.permute(torch.from_numpy(perm))
    plan = LayerPlan(layer, options.n_sub, options.gates)
    plan.tensors["ridge"] = ridge_scorer.fit(plan, samples)
    plan.tensors["levels"] = _levels(plan, statistics, samples)
    shares = [p.cost / max(float(m.sum(dtype=np.float64)), 1e-30) for p, m in zip(partitions.values(), mass, strict=True)]
    facts = {
        "name": layer.name,
        "experts": layer.num_experts,
        "width": layer.width,
        "cost_share": round(float(np.mean(shares)), 6),
        "starved": starved,
    }
    return {"perm": torch.from_numpy(perm.astype(np.int32)), **plan.tensors}, facts


def _samples(statistics: LayerStatistics) -> tuple[list[Tensor], list[int]]:
    """Inputs [S_e, d] per expert, and which experts are starved: those borrow the inputs of the best fed one to reach STARVED rows."""
    samples = [statistics.inputs(e)[0] for e in range(len(statistics.kept()))]
    richest = max(samples, key=len)
    least = min(STARVED, len(richest))
    starved = [e for e, x in enumerate(samples) if len(x) < least]
    for e in starved:
        samples[e] = torch.cat([samples[e], richest[: least - len(samples[e])]])
    return samples, starved


def _rows(weight: Tensor | None, expert: int) -> Any:
    return None if weight is None else weight[expert].float().numpy()


def _levels(plan: LayerPlan, statistics: LayerStatistics, samples: list[Tensor]) -> Tensor:
    """Levels for the threshold rule: slot values of each expert's sample, weighted by how often the expert is chosen."""
    scorer = ridge_scorer.Ridge(plan)
    values, importance = [], []
    for e, x in enumerate(samples):
        _, weight = statistics.inputs(e)
        rows = x[: len(weight)]
        if len(rows):
            norms = scorer(rows, torch.full((len(rows), 1), e))[:, 0]
            values.append((weight.abs()[:, None] * norms).flatten())
            importance.append(torch.full_like(values[-1], float(statistics.values["counts"]["count"][e]) / len(rows)))
    return fit_levels(torch.cat(values), torch.cat(importance))
