"""Measuring whole points on a checkpoint that was never refactored: no rule, no predictor, nothing to choose."""

import pytest
import torch

from moe_prism.elastic import attach
from moe_prism.frontier.measure import measure
from moe_prism.point import FULL, OperatingPoint, RoutingStage
from tests.parity.families import build

IDS = torch.arange(3, 35).reshape(2, 16) % 31 + 2


def test_a_plain_model_has_a_cost_at_full_budget_and_with_fewer_experts():
    model = build("olmoe")
    elastic = attach(model, 1)
    layers = [layer.parts.layer for layer in elastic.layers]
    skip = RoutingStage(layers=(1,) * len(layers), keep_mass=False)
    full, half = measure(model, IDS, [FULL, OperatingPoint(routing=(skip,))])
    weights = sum(layer.parameters_per_expert() for layer in layers)
    assert full.cost.active_expert_params == pytest.approx(2 * weights)
    assert half.cost.active_expert_params == pytest.approx(weights)
    assert full.cost.k_slots == 2 and half.cost.k_slots == 1
    assert full.quality.kl == 0 < half.quality.kl
    assert (
        full.resident_bytes == half.resident_bytes == sum(each.num_experts * each.parameters_per_expert() for each in layers) * 4
    )
