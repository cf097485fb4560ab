"""What few tokens run against the forms that any number of tokens can run: equal to the last bit, not close."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic import LayerParts, Slots, attach, operating_point
from moe_prism.elastic.compensate.base import Compensator
from moe_prism.elastic.execute import decode_products, tiled
from moe_prism.elastic.execute.batch_products import usable
from moe_prism.elastic.fused_select import select_few
from moe_prism.elastic.rules import rules
from moe_prism.elastic.rules.threshold import QUANTILES
from moe_prism.elastic.scorers import scorers
from moe_prism.elastic.scorers.ridge import FEW

from .test_compensate import fitted
from .test_execute import batch
from .test_tiled import arranged

N, K = 4, 2


def plan_of(gates=1, n_sub=N, dtype=torch.float32):
    layer = arranged("olmoe")
    layer.module.to(dtype)
    g = torch.Generator().manual_seed(gates)
    ridge = torch.randn(layer.num_experts, n_sub, layer.hidden + n_sub * gates + 1, generator=g) * 0.3
    return LayerParts(layer, n_sub, gates, {"ridge": ridge, "cutoffs": torch.linspace(2.0, 0.0, QUANTILES)})


PLANS = {gates: plan_of(gates) for gates in (0, 1, 2)}


@torch.no_grad()
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    runs=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_outputs_are_those_of_the_tiles(seed, tokens, dtype, runs):
    """runs: neighbours ask for the same expert, as in a store; several rows then share a tile."""
    plan = plan_of(0, 1, dtype)
    x, expert, weight, _ = batch(plan, tokens, 1, seed)
    expert = expert.sort(0).values if runs else expert
    row = torch.randint(tokens, (tokens,), generator=torch.Generator().manual_seed(seed))
    found = decode_products.few_outputs(plan, x, row.numpy(), weight[:, 0].numpy(), expert[:, 0].numpy())
    keep = torch.ones(tokens, 1, 1, dtype=torch.bool)
    assert torch.equal(torch.from_numpy(found), tiled.tiled(plan, x[row], expert, weight, keep))


def test_outputs_of_many_rows_or_with_biases_are_left_to_others():
    plan = plan_of(0, 1)
    x, expert, weight, _ = batch(plan, decode_products.ENOUGH + 1, 1, 0)
    arrays = (torch.arange(len(x)).numpy(), weight[:, 0].numpy(), expert[:, 0].numpy())
    assert decode_products.few_outputs(plan, x, *arrays) is None
    biased = LayerParts(arranged("gpt_oss"), 1, 0)
    assert decode_products.few_outputs(biased, torch.randn(2, biased.layer.hidden), *(a[:2] for a in arrays)) is None


@torch.no_grad()
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 32), gates=st.sampled_from([0, 1, 2]))
@settings(max_examples=30, deadline=None)
def test_norms_do_not_depend_on_how_many_ask(seed, tokens, gates):
    plan = PLANS[gates]
    scorer = scorers.get("ridge")(plan)
    x, index, _, _ = batch(plan, tokens, K, seed)
    assert torch.equal(scorer(x, index), scorer._tiled(x, index, usable(plan, x)))
    many = scorer(x.repeat(40, 1), index.repeat(40, 1))
    assert torch.equal(scorer(x, index), many[:tokens])
    torch.testing.assert_close(many[:1], scorer._few(x[:1].repeat_interleave(K, 0), index[0]).view(1, K, -1), rtol=1e-5, atol=0)


@torch.no_grad()
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 32),
    gates=st.sampled_from([0, 1]),
    rule=st.sampled_from(["product", "threshold"]),
    one=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_selection_is_that_of_scorer_and_rule(seed, tokens, gates, rule, one):
    plan = PLANS[gates]
    scorer, made = scorers.get("ridge")(plan), rules.get(rule)(plan)
    x, index, weight, g = batch(plan, tokens, K, seed)
    index[torch.rand(tokens, K, generator=g) < 0.1] = -1
    index[torch.rand(tokens, K, generator=g) < 0.05] = plan.layer.num_experts
    budget = torch.rand(tokens, generator=g).clamp(min=0.01)
    valid = index.clamp(0, plan.layer.num_experts - 1) == index
    slots = Slots(x, index, weight, valid, N, lambda: scorer(x, index.clamp(0, plan.layer.num_experts - 1)))
    budget = budget[:1].expand(tokens) if one else budget
    found = select_few(scorer, made, x, index, weight, float(budget[0]) if one else budget)
    assert torch.equal(found, made.keep(slots, budget))


def test_what_it_does_not_take_is_left_to_scorer_and_rule():
    plan = PLANS[1]
    x, index, weight, _ = batch(plan, 2, K, 0)
    ridge, product = scorers.get("ridge")(plan), rules.get("product")(plan)
    assert select_few(ridge, rules.get("mass")(plan), x, index, weight, 0.5) is None
    assert select_few(scorers.get("gates")(plan), product, x, index, weight, 0.5) is None
    assert select_few(ridge, product, x, index, weight.bfloat16(), 0.5) is None
    assert select_few(ridge, product, x.double(), index, weight, 0.5) is None
    many = batch(plan, FEW, K, 0)
    assert select_few(ridge, product, *many[:3], 0.5) is None


@torch.no_grad()
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 32))
@settings(max_examples=30, deadline=None)
def test_compensation_of_few_slots_is_that_of_many(seed, tokens):
    extra = MEAN
    x, index, weight, g = batch(extra.parts, tokens, K, seed)
    keep = torch.rand(tokens, K, extra.parts.n_sub, generator=g) < 0.5
    index[torch.rand(tokens, K, generator=g) < 0.1] = -1
    keep &= (index >= 0)[:, :, None]
    assert torch.equal(extra(x, index, weight, keep), Compensator.__call__(extra, x, index, weight, keep))


MEAN = fitted(arranged("olmoe"), "mean")


@torch.no_grad()
def test_a_model_gives_one_token_what_it_gives_among_many(model_and_ids):
    model, ids = model_and_ids
    with operating_point(model, 0.5, rule="product"):
        together = [model(ids, use_cache=False).logits]
        together.append(torch.cat([model(ids[i : i + 1], use_cache=False).logits for i in range(len(ids))]))
    torch.testing.assert_close(*together, rtol=1e-5, atol=1e-5)


@pytest.fixture
def model_and_ids():
    from moe_prism.model import find_layers
    from tests.parity.families import build

    model = build("olmoe")
    layers = find_layers(model)
    for layer in layers:
        layer.arrange()
    tensors = [{"ridge": torch.randn(e.num_experts, N, e.hidden + N + 1) * 0.1} for e in layers]
    attach(model, N, gates=1, tensors=tensors, layers=layers)
    return model, torch.randint(0, 50, (30, 4), generator=torch.Generator().manual_seed(0))
