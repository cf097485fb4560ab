"""Which sub-experts an elastic model's tokens read at a budget, counted on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..calibrate.run import backbone_of, input_device
from ..elastic.bind import Step, bind
from ..elastic.layer import ElasticLayer
from ..forecast.step_time import Read, Reads
from ..point import FULL

RULE = "threshold"  # what a budget is spent by unless it is said


@torch.no_grad()
def block_choices(model: Any, ids: Tensor, budgets: Sequence[float], *, batch: int = 8) -> dict[float, Reads]:
    """For every share of the slots the share of tokens of windows ids [n, length] that keep each sub-expert, and read each predictor."""
    elastic = model._moe_prism
    steps = [Step(bind(elastic, [FULL.with_slots(budget, RULE)])) for budget in budgets]
    counted = [_Counted(layer, steps) for layer in elastic.layers]
    try:
        for each in counted:
            each.layer.parts.layer.install(each)
        for start in range(0, len(ids), batch):
            backbone_of(model)(input_ids=ids[start : start + batch].to(input_device(model)), use_cache=False)
    finally:
        for layer in elastic.layers:
            layer.parts.layer.install(layer)
    tokens = ids.numel()
    n_sub = elastic.layers[0].parts.n_sub
    chosen = tuple((each.chosen / tokens).numpy() for each in counted)
    predictor = Read(chosen, _predictor_size(elastic.layers[0]))
    return {
        budget: (Read(tuple((each.kept[i] / tokens).flatten().numpy() for each in counted), 1 / n_sub), predictor)
        for i, budget in enumerate(budgets)
    }


def _predictor_size(layer: ElasticLayer) -> float:
    """Weights read to choose among the sub-experts of one chosen expert, as a share of the expert: predictor and gate neurons."""
    parts = layer.parts
    matrices = 2 if parts.layer.gate is not None else 1
    gates = parts.n_sub * parts.gates * matrices * parts.layer.hidden
    return (layer.scorer("ridge").parameters_per_expert() + gates) / parts.layer.parameters_per_expert()


class _Counted:
    """An experts function that computes what the model does and counts what every step would keep. chosen [E], kept [E, N] each."""

    def __init__(self, layer: ElasticLayer, steps: Sequence[Step]) -> None:
        experts = layer.parts.layer.num_experts
        self.layer, self.steps = layer, steps
        self.chosen = torch.zeros(experts, dtype=torch.float64)
        self.kept = [torch.zeros(experts, layer.parts.n_sub, dtype=torch.float64) for _ in steps]

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        flat = index.flatten().cpu()
        self.chosen += torch.bincount(flat, minlength=len(self.chosen))
        for step, kept in zip(self.steps, self.kept, strict=True):
            keep = self.layer.kept(step, x, index, weight)
            kept.index_add_(0, flat, keep.flatten(0, 1).double().cpu())
        return self.layer.parts.layer.native(x, index, weight)


def at_budget(model: Any, budget: float) -> Callable[[], Any]:
    """Makes contexts in which an elastic model runs at this share of the slots."""
    from ..elastic import operating_point

    return lambda: operating_point(model, point=FULL.with_slots(budget, RULE))
