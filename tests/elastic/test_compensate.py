"""Compensation: each method against its formula, on every storage of experts; what it must never change; what it costs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from moe_prism.elastic import Elastic, LayerParts, attach, compensate, operating_point
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.compensate import ExpertSample, compensators
from moe_prism.elastic.compensate.base import MIN_ROWS, Blocks, Compensator
from moe_prism.elastic.compensate.low_rank import FEW, _reduced_rank
from moe_prism.elastic.execute.plain import grouped
from moe_prism.frontier.cost import measured_cost
from moe_prism.model import find_layers
from moe_prism.point import OperatingPoint, SlotRule
from tests.model.test_dense import build as build_dense
from tests.parity.families import build

METHODS = ["mean", "scale", "low-rank"]
LAYOUTS = ["olmoe", "gpt_oss", "aria", "nemotron_h"]  # concatenated, interleaved with biases, transposed, ungated
DENSE = ["llama", "starcoder2"]  # one expert; without a gate and with biases
N, RANK = 4, 2


def samples(layer, rows=120, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        ExpertSample(torch.randn(rows, layer.hidden, generator=g), torch.rand(rows, N, generator=g) < 0.5)
        for _ in range(layer.num_experts)
    ]


def fitted(layer, method, given=None):
    plan = LayerParts(layer, N, 0)
    with torch.no_grad():
        found = compensate.fit(method, plan, given or samples(layer), RANK)
    assert type(compensate.compensator(plan)) is type(found) and found.method == method
    return found


@pytest.fixture(scope="module", params=[*LAYOUTS, *DENSE])
def layer(request):
    return layers_of(request.param)[0]


def whole_experts(budget, compensate=True):
    """The point that keeps experts, and slots within the last one, by order."""
    return OperatingPoint(slots=SlotRule(budget=budget, rule="whole-experts", compensate=compensate))


def layers_of(family):
    return find_layers(build_dense(family) if family in DENSE else build(family))


def batch(layer, tokens, seed=0, share=0.5):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, layer.hidden, generator=g)
    k = min(2, layer.num_experts)
    index = torch.stack([torch.randperm(layer.num_experts, generator=g)[:k] for _ in range(tokens)])
    return x, index, torch.rand(tokens, k, generator=g), torch.rand(tokens, k, N, generator=g) < share


def slot_by_slot(extra, x, index, weight, keep):
    """The definition, one dropped slot at a time."""
    layer, out = extra.parts.layer, torch.zeros(x.shape)
    for t in range(len(x)):
        for c in range(index.shape[1]):
            e = int(index[t, c])
            if not 0 <= e < layer.num_experts:
                continue
            for n in range(N):
                estimate = extra.estimate(x[t : t + 1], e, n)
                if not keep[t, c, n] and estimate is not None:
                    out[t] += weight[t, c] * estimate[0]
            if layer.down_bias is not None and not keep[t, c].any():
                out[t] += weight[t, c] * layer.down_bias[e]
    return out


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 5, 90])  # below and above FEW dropped slots
def test_what_is_added_is_the_sum_of_the_estimates(layer, method, tokens):
    extra = fitted(layer, method)
    x, index, weight, keep = batch(layer, tokens)
    assert (tokens == 90) == (int((~keep).sum()) > FEW)
    keep[0, -1] = False  # an expert that loses everything, its bias too
    if tokens > 1:
        index[1, 0] = -1
        keep[1, 0] = False
    torch.testing.assert_close(extra(x, index, weight, keep), slot_by_slot(extra, x, index, weight, keep), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_where_all_is_kept(layer, method):
    extra = fitted(layer, method)
    x, index, weight, keep = batch(layer, 7)
    keep[::2] = True
    assert extra(x, index, weight, keep)[::2].abs().max() == 0
    assert torch.equal(extra.weights(index, weight, keep)[::2], weight[::2])


@torch.no_grad()
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 40), share=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_tokens_do_not_touch_each_other(seed, tokens, share):
    layer = find_layers(OLMOE)[0]
    x, index, weight, keep = batch(layer, tokens, seed, share)
    for method in METHODS:
        extra = EXTRAS[method]
        together = extra(x, index, weight, keep)
        alone = torch.cat([extra(x[t : t + 1], index[t : t + 1], weight[t : t + 1], keep[t : t + 1]) for t in range(tokens)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


OLMOE = build("olmoe")
EXTRAS = {method: fitted(find_layers(OLMOE)[0], method) for method in METHODS}


@torch.no_grad()
def test_mean_is_that_of_the_dropped_rows_only(layer):
    given = samples(layer)
    loud = given[0].x.clone()
    loud[~given[0].dropped[:, 1]] *= 1000.0  # massive activations where the block is kept say nothing about where it is dropped
    extra = fitted(layer, "mean", [ExpertSample(loud, given[0].dropped), *given[1:]])
    rows = given[0].x[given[0].dropped[:, 1]]
    block = slice(layer.width // N, 2 * layer.width // N)
    expected = layer.activations(0, rows, block) @ layer.down[0][:, block].T
    torch.testing.assert_close(
        extra.estimate(rows, 0, 1)[0], expected.mean(0), rtol=1e-2, atol=1e-2 * float(expected.abs().max())
    )


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_too_few_rows_compensate_nothing(layer, method):
    extra = fitted(layer, method, samples(layer, rows=MIN_ROWS - 1))
    x, index, weight, keep = batch(layer, 5)
    keep[:, :, 0] = True  # no expert is lost, so no bias
    assert extra(x, index, weight, keep).abs().max() == 0
    assert torch.equal(extra.weights(index, weight, keep), weight)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_the_fit_lowers_the_error_it_is_fitted_to(layer, method):
    given = samples(layer, 400)
    extra = fitted(layer, method, given)
    x, keep = given[-1].x, ~given[-1].dropped[:, None]
    index, weight = torch.full((len(x), 1), layer.num_experts - 1), torch.ones(len(x), 1)
    full = layer.stock(x, index, weight)
    plain = grouped(extra.parts, x, index, weight, keep)
    better = grouped(extra.parts, x, index, extra.weights(index, weight, keep), keep) + extra(x, index, weight, keep)
    assert (better - full).square().sum() < (plain - full).square().sum()


@torch.no_grad()
def test_scale_is_least_squares_per_number_of_kept_blocks(layer):
    given = samples(layer, 400)
    extra = fitted(layer, "scale", given)
    keep = ~given[-1].dropped
    rows = keep.sum(1) == 2
    x = given[-1].x[rows]
    index, weight = torch.full((len(x), 1), layer.num_experts - 1), torch.ones(len(x), 1)
    kept = grouped(extra.parts, x, index, weight, keep[rows][:, None])
    full = layer.stock(x, index, weight)
    best = torch.linalg.lstsq(kept.reshape(-1, 1), full.reshape(-1, 1)).solution.item()
    assert float(extra.weights(index, weight, keep[rows][:, None])[0]) == pytest.approx(best, rel=1e-2)


def test_reduced_rank_recovers_a_low_rank_truth():
    g = torch.Generator().manual_seed(0)
    x, a, b = torch.randn(500, 24, generator=g), torch.randn(24, 2, generator=g), torch.randn(2, 30, generator=g)
    y = x @ a @ b + 3.0
    mean, read, write = _reduced_rank(x, y, 2)
    predicted = mean + x.double() @ read.T @ write
    assert ((predicted - y).square().sum() / (y - y.mean(0)).square().sum()) < 0.02  # what the penalty costs
    torch.testing.assert_close(write @ write.T, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_reduced_rank_equals_the_decomposition_of_the_full_fit():
    """Reference: truncated SVD of the fitted values of the augmented problem."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(300, 20, generator=g).double(), torch.randn(300, 17, generator=g).double()
    mean, read, write = _reduced_rank(x, y, 4)
    xc, yc = x - x.mean(0), y - y.mean(0)
    penalty = 0.1 * (xc * xc).sum() / 20
    rows = torch.cat([xc, penalty.sqrt() * torch.eye(20, dtype=torch.float64)])
    slope = torch.linalg.lstsq(rows, torch.cat([yc, torch.zeros(20, 17, dtype=torch.float64)])).solution
    v = torch.linalg.svd(rows @ slope, full_matrices=False).Vh[:4]
    torch.testing.assert_close(x @ read.T @ write + mean, xc @ slope @ v.T @ v + y.mean(0), rtol=0, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("method", ["mean", "low-rank"])
def test_losses_are_what_remains(layer, method):
    extra = fitted(layer, method)
    x = torch.randn(9, layer.hidden, generator=torch.Generator().manual_seed(5))
    y = layer.project(0, layer.activations(0, x, extra.parts.neurons(3)), extra.parts.neurons(3))
    torch.testing.assert_close(extra.losses(x, 0)[:, 3], (y - extra.estimate(x, 0, 3)).norm(dim=1))


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", *DENSE])
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_uses_its_own_tensors(family, method):
    """A shared closure once gave every layer the last layer's tensors, with plausible numbers."""
    layers = layers_of(family)
    assert len(layers) > 1
    plans = [fitted(layer, method, samples(layer, seed=i)).parts for i, layer in enumerate(layers)]
    elastic = Elastic(None, plans)
    half, plain = (Step(bind(elastic, [whole_experts(0.5, flag)])) for flag in (True, False))
    for layer, plan in zip(elastic.layers, plans, strict=True):
        mine = plan.layer
        x = torch.randn(6, mine.hidden, generator=torch.Generator().manual_seed(3))
        index = torch.arange(6)[:, None] % mine.num_experts
        weight = torch.linspace(0.2, 1.0, 6)[:, None]
        keep = torch.zeros(6, 1, N, dtype=torch.bool)
        keep[:, 0, :2] = True  # the first two of four, by order: what `whole-experts` does at .5
        extra = compensate.compensator(plan)
        expected = grouped(plan, x, index, extra.weights(index, weight, keep), keep) + slot_by_slot(extra, x, index, weight, keep)
        with elastic.at(half):
            torch.testing.assert_close(layer(x, index, weight), expected, rtol=1e-4, atol=1e-5)
        with elastic.at(plain):
            torch.testing.assert_close(layer(x, index, weight), grouped(plan, x, index, weight, keep), rtol=1e-4, atol=1e-5)
    for a, b in pairwise(plans):
        assert any(not torch.equal(a.tensors[key], b.tensors[key]) for key in a.tensors)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_full_budget_is_exact_and_the_switch_works(method):
    model = build("olmoe")
    ids = torch.arange(3, 15)[None]
    before = model(ids).logits
    attach(model, N)
    with operating_point(model, 0.5, rule="whole-experts"):
        plain = model(ids).logits
    layers = find_layers(model)
    elastic = attach(model, N, tensors=[fitted(layer, method).parts.tensors for layer in layers], layers=layers)
    elastic.always_split = True
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    elastic.always_split = False
    with operating_point(model, point=whole_experts(0.5, compensate=False)):
        assert torch.equal(model(ids).logits, plain)
    # the rule keeps whole experts, so there is nothing left to scale
    with operating_point(model, 0.5, rule="whole-experts"):
        assert torch.equal(model(ids).logits, plain) == (method == "scale")


@torch.no_grad()
@pytest.mark.parametrize("method", ["mean", "low-rank"])
@pytest.mark.parametrize("tokens", [3, 90])
def test_cost_is_the_counted_number(layer, method, tokens):
    """FLOPs by torch's counter, which knows matmuls and not embedding_bag: that one reads a table row per dropped slot."""
    extra = fitted(layer, method)
    x, index, weight, keep = batch(layer, tokens)
    bags = []
    original, Blocks.combine = Blocks.combine, lambda blocks, *a: (bags.append(len(blocks.block)), original(blocks, *a))[1]
    try:
        with FlopCounterMode(display=False) as counted:
            Compensator.__call__(extra, x, index, weight, keep)  # not the form for few slots, which torch cannot count
    finally:
        Blocks.combine = original
    read = counted.get_total_flops() // 2 + sum(bags) * layer.hidden
    per_slot, per_expert = extra.parameters()
    assert (int((~keep).sum()) * per_slot, per_expert) == (read, 0)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_measured_cost_adds_what_compensation_reads(layer, method):
    x, index, weight, _ = batch(layer, 8)
    extra = fitted(layer, method)
    plain, paid = (Elastic(None, [LayerParts(layer, N, 0, dict(tensors))]) for tensors in ({}, extra.parts.tensors))
    for budget in (0.3, 1.0):
        costs = []
        for elastic in (plain, paid):
            with elastic.at([whole_experts(budget)]) as step, elastic.count():
                elastic.layers[0](x, index, weight)
            costs.append(measured_cost(elastic, step).active_expert_params)
        counter = paid.layers[0].counter
        dropped = counter.chosen * N - counter.kept
        assert dropped == (0 if budget == 1 else counter.chosen * N - 8 * round(0.3 * index.shape[1] * N))
        touched = int(counter.per_token["experts"].sum())
        bias = 0 if layer.down_bias is None else layer.hidden
        expected = (read(extra, touched, dropped) + (counter.chosen - touched) * bias) / 8 if dropped else 0
        assert costs[1] - costs[0] == pytest.approx(expected)
        without = Step(bind(paid, [whole_experts(budget, compensate=False)]))
        assert measured_cost(paid, without).active_expert_params == pytest.approx(costs[0])


def read(extra, touched, dropped):
    """Weights that each method reads, from its definition."""
    hidden = extra.parts.layer.hidden
    return {"mean": dropped * hidden, "scale": touched, "low-rank": dropped * (2 * RANK + 1) * hidden}[extra.method]


def test_the_registry_names_them():
    assert compensators.names() == METHODS
