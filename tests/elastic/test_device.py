"""Selection on a GPU: the forms that ask the device nothing give what the plain ones give.

Tensors on `meta` have no values: any `.item()`, `.tolist()` or `nonzero` on the way raises, so a whole selection that runs there never
waits for the device.
"""

import pytest
import torch

from moe_prism.elastic import LayerParts, attach
from moe_prism.elastic.base import gate_activations, gate_activations_all, per_expert
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.counter import Counter
from moe_prism.elastic.execute.triton_align import align
from moe_prism.elastic.scorers import ridge as ridge_module
from moe_prism.elastic.scorers import scorers
from moe_prism.elastic.scorers.ridge import FEW
from moe_prism.model import find_layers
from moe_prism.point import FULL, OperatingPoint, RoutingStage, SlotRule
from moe_prism.point.base import slots_unit
from tests.parity.families import build

FAMILIES = ["olmoe", "gpt_oss", "aria", "nemotron_h"]  # concatenated, interleaved with bias, transposed, ungated
N, R = 4, 2


def inputs(layer, tokens=80):
    g = torch.Generator().manual_seed(0)
    index = torch.rand(tokens, layer.num_experts, generator=g).argsort(1)[:, :2]
    return torch.randn(tokens, layer.hidden, generator=g), index


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_gate_activations_of_all_experts_at_once(family):
    plan = LayerParts(find_layers(build(family), dense=False)[0], N, R)
    x, index = inputs(plan.layer)
    each = per_expert(index, plan.layer.num_experts, lambda e, rows: gate_activations(plan, x[rows], e).flatten(1), N * R)
    torch.testing.assert_close(gate_activations_all(plan, x, index).flatten(2), each, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("gates", [0, R])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_predictor_for_all_experts_at_once(family, gates):
    plan = LayerParts(find_layers(build(family), dense=False)[0], N, gates)
    x, index = inputs(plan.layer)
    plan.tensors["ridge"] = ridge_module.fit(plan, [x] * plan.layer.num_experts).weight
    scorer = scorers.get("ridge")(plan)
    torch.testing.assert_close(scorer._all(x, index), scorer(x, index), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, FEW])
@pytest.mark.parametrize("scorer", ["ridge", "gates"])
@pytest.mark.parametrize("rule", ["product", "threshold", "batch-blocks", "first-slot", "mass", "pattern", "whole-experts"])
def test_selection_asks_the_device_nothing(rule, scorer, tokens):
    elastic = on_meta()
    layer = elastic.layers[0]
    x, index = (v.to("meta") for v in inputs(layer.parts.layer, tokens))
    half = OperatingPoint(slots=SlotRule(budget=0.5, rule=rule, scorer=scorer, of=slots_unit(rule), control="none"))
    step = Step(bind(elastic, [half]), 0, torch.full((tokens,), 0.5, device="meta"))
    weight = torch.empty(tokens, 2, device="meta")
    keep = layer.kept(step, x, index, weight)
    layer.counter.add(index, keep, selects=True)
    align(index, keep, layer.parts.layer.num_experts, 16)
    assert keep.shape == (tokens, 2, N) and keep.is_meta


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, FEW])
def test_mixed_points_ask_the_device_nothing(tokens):
    """Tokens of several points, of one kind and of several, with a stage in some: which is whose only the device knows."""
    elastic = on_meta()
    layer = elastic.layers[0]
    x, index = (v.to("meta") for v in inputs(layer.parts.layer, tokens))
    weight, which = torch.empty(tokens, 2, device="meta"), torch.zeros(tokens, dtype=torch.long, device="meta")
    skip = RoutingStage(layers=(1,) * len(elastic.layers), keep_mass=True)
    alike = [FULL.with_slots(0.5), FULL.with_slots(0.25), FULL]
    for points in (
        alike,
        [*alike, OperatingPoint(routing=(skip,)), FULL.with_budget(0.5, "product"), FULL.with_budget(0.5, "batch-blocks")],
    ):
        candidates = layer.candidates(Step(bind(elastic, points), which), x, index, weight)
        keep = candidates.keep()
        assert keep.shape == (tokens, 2, N) and keep.is_meta and candidates.weight.is_meta


def on_meta():
    layers = find_layers(build("olmoe"))
    width = layers[0].hidden + N * R + 1
    side = [{"ridge": torch.zeros(layer.num_experts, N, width), "cutoffs": torch.linspace(1, 0, 129)} for layer in layers]
    return attach(build("olmoe").to("meta"), N, gates=R, tensors=side)


def test_counts_are_read_as_numbers():
    counter = Counter(5, N)
    index, keep = torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2, N, dtype=torch.bool)
    keep[0, 1, :2] = True
    counter.add(index, keep)
    counter.add(index, None)
    touched = int(counter.per_token["experts"].sum())
    assert (counter.tokens, counter.chosen, touched, counter.kept) == (6, 12, 7, 2 + 6 * N)
    assert isinstance(counter.kept, int)


def test_sends_are_devices_that_compute_something_for_a_token():
    index = torch.tensor([[0, 1], [1, 4], [3, 5], [2, -1]])  # 5 and -1 are no experts
    keep = torch.ones(4, 2, N, dtype=torch.bool)
    keep[1, 1] = False
    for devices, sends in ((0, 2 + 1 + 1 + 1), (5, 5), (2, 1 + 1 + 1 + 1), (1, 4)):  # of two, the first has 0, 1, 2
        counter = Counter(5, N, devices=devices)
        counter.add(index, keep)
        assert counter.sends == sends
    counter = Counter(5, N, devices=2)
    counter.add(torch.tensor([[0, 4]]), None)
    assert counter.sends == 2
