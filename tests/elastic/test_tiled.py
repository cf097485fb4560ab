"""The compiled executor: equal to the reference for every storage, indifferent to neighbours, threads and how the work is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic import LayerParts, attach, operating_point
from moe_prism.elastic.execute import batch_products, tiled
from moe_prism.elastic.execute.batch_products import Matrix, MatrixPart, SlotGroups, usable
from moe_prism.elastic.execute.memory import auto
from moe_prism.elastic.execute.plain import grouped, reference
from moe_prism.elastic.scorers import ridge as ridge_module
from moe_prism.elastic.scorers import scorers
from moe_prism.kernels import threads
from moe_prism.kernels.tiles import LANES
from moe_prism.model import find_layers
from moe_prism.point import FULL
from tests.model import test_dense
from tests.parity.families import build

from .test_execute import LAYOUTS, batch, close

DENSE = ["llama", "phi3", "phi", "nemotron"]  # gate and up apart, in one Linear, biases without a gate, squared ReLU


def arranged(family):
    layer = find_layers(test_dense.build(family) if family in DENSE else build(family))[0]
    layer.arrange()
    return layer


@pytest.fixture(scope="module", params=LAYOUTS + DENSE)
def layer(request):
    return arranged(request.param)


@pytest.fixture(scope="module")
def olmoe():
    return LayerParts(arranged("olmoe"), 4, 0)


def choices(layer):
    return min(2, layer.num_experts)


@torch.no_grad()
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 60), share=st.floats(0, 1), n_sub=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_equals_the_reference(layer, seed, tokens, share, n_sub):
    plan = LayerParts(layer, n_sub, 0)
    x, index, weight, g = batch(plan, tokens, choices(layer), seed)
    keep = torch.rand(*index.shape, n_sub, generator=g) < share
    out = tiled.tiled(plan, x, index, weight, keep)
    assert out is not None
    close(out, reference(plan, x, index, weight, keep))


@torch.no_grad()
def test_all_slots_kept_is_the_stock_layer(layer):
    plan = LayerParts(layer, 4, 0)
    x, index, weight, _ = batch(plan, 9, choices(layer), 0)
    weight = torch.ones_like(weight) if layer.num_experts == 1 else weight
    keep = torch.ones(*index.shape, 4, dtype=torch.bool)
    close(auto(plan, x, index, weight, keep), layer.stock(x, index, weight))


@torch.no_grad()
def test_a_token_does_not_see_its_neighbours(olmoe):
    """Not even in the last bit: its sums are made in one order, whatever the shapes of the tiles."""
    x, index, weight, g = batch(olmoe, 70, 2, 3)
    keep = torch.rand(70, 2, 4, generator=g) < 0.6
    together = tiled.tiled(olmoe, x, index, weight, keep)
    for rows in (slice(0, 1), slice(5, 7), slice(11, 50)):
        assert torch.equal(tiled.tiled(olmoe, x[rows], index[rows], weight[rows], keep[rows]), together[rows])


@torch.no_grad()
def test_threads_and_pieces_change_nothing(olmoe, monkeypatch):
    x, index, weight, g = batch(olmoe, 50, 2, 4)
    keep = torch.rand(50, 2, 4, generator=g) < 0.6
    alone = tiled.tiled(olmoe, x, index, weight, keep)
    monkeypatch.setattr(tiled, "PIECE", 64)
    assert torch.equal(tiled.tiled(olmoe, x, index, weight, keep), alone)
    monkeypatch.setattr(threads, "ONE_THREAD_WORK", 0)
    count = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        if threads.can_share():
            assert torch.equal(tiled.tiled(olmoe, x, index, weight, keep), alone)
    finally:
        torch.set_num_threads(count)


@torch.no_grad()
def test_a_token_with_one_expert_twice_is_left_to_the_other_executor(olmoe):
    x, index, weight, g = batch(olmoe, 6, 2, 5)
    index[2] = 3
    keep = torch.rand(6, 2, 4, generator=g) < 0.9
    keep[2] = True
    assert tiled.tiled(olmoe, x, index, weight, keep) is None
    close(auto(olmoe, x, index, weight, keep), reference(olmoe, x, index, weight, keep))


@torch.no_grad()
def test_skipped_ids_add_nothing(olmoe):
    x, index, weight, _ = batch(olmoe, 5, 2, 6)
    index[:, 1] = -1
    keep = torch.ones(5, 2, 4, dtype=torch.bool) & (index >= 0)[:, :, None]
    close(tiled.tiled(olmoe, x, index, weight, keep), olmoe.layer.stock(x, index[:, :1], weight[:, :1]))


def test_what_it_cannot_run_is_left_to_the_other_executor():
    layer = find_layers(build("olmoe"))[0]
    plan = LayerParts(layer, 4, 0)
    x, index, weight, g = batch(plan, 4, 2, 7)
    keep = torch.rand(4, 2, 4, generator=g) < 0.7
    with torch.no_grad():
        assert usable(plan, x) is None  # stored the other way round
        layer.arrange()
        assert usable(plan, x) is not None  # the weights moved, and that was noticed
        assert usable(plan, x.double()) is None
    assert usable(plan, x) is None  # gradients
    auto(plan, x, index, weight, keep).sum().backward()
    assert layer.module.down_proj.grad.abs().sum() > 0
    layer.module.double()
    with torch.no_grad():
        out = auto(plan, x.double(), index, weight.double(), keep)
        close(out, grouped(plan, x.double(), index, weight.double(), keep))


@torch.no_grad()
@given(rows=st.integers(1, 20), columns=st.integers(1, 21), vectors=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_products_of_any_size(rows, columns, vectors, seed):
    """The two products alone, one group, against torch; sizes that leave remainders in every direction."""
    g = torch.Generator().manual_seed(seed)
    depth = vectors * LANES
    x, w, wide = torch.randn(rows, depth, generator=g), torch.randn(2, columns, depth, generator=g), torch.ones(rows, columns + 3)
    groups = SlotGroups.of(torch.ones(rows, 1, dtype=torch.long), torch.ones(rows, 1, 1, dtype=torch.bool), 2)
    batch_products.dot(
        x, groups, groups.all, batch_products.Columns([MatrixPart(Matrix.of(w), 2)], columns, columns), wide, groups.choice
    )
    torch.testing.assert_close(wide[:, 2:-1], x @ w[1].T, rtol=1e-4, atol=1e-4)
    assert (wide[:, :2] == 1).all() and (wide[:, -1] == 1).all()
    a, out = torch.randn(rows, columns, generator=g), torch.ones(rows, depth)
    batch_products.add(a, groups, groups.all, Matrix.of(w), out)
    torch.testing.assert_close(out, 1 + a @ w[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "aria", "nemotron_h", "phi3"])
@pytest.mark.parametrize("gates", [0, 1, 3])
def test_the_predictor_equals_its_tensor_form(family, gates, monkeypatch):
    layer = arranged(family)
    plan = LayerParts(layer, 4, gates)
    g = torch.Generator().manual_seed(0)
    plan.tensors["ridge"] = 0.1 * torch.randn(layer.num_experts, 4, layer.hidden + 4 * gates + 1, generator=g)
    scorer = scorers.get("ridge")(plan)
    x, index, _, _ = batch(plan, 40, choices(layer), 1)
    fast = scorer(x, index)
    assert torch.equal(scorer(x[7:9], index[7:9]), fast[7:9])
    monkeypatch.setattr(batch_products, "usable", lambda *_: None)
    torch.testing.assert_close(fast, scorer(x, index), rtol=1e-4, atol=1e-5)
    assert ridge_module.CEILING < 88  # exp of it is a finite float32


@torch.no_grad()
@pytest.mark.parametrize("rule", ["product", "threshold"])
def test_budgets_of_one_batch_are_independent(rule):
    """Some tokens at full budget, some below: each as if it were alone at its own."""
    model = build("olmoe")
    layers = find_layers(model)
    for layer in layers:
        layer.arrange()
    g = torch.Generator().manual_seed(2)
    tensors = [
        {
            "ridge": 0.1 * torch.randn(x.num_experts, 4, x.hidden + 5, generator=g),
            "cutoffs": torch.linspace(2, 0, 129),
            "shares": torch.linspace(0, 1, 129),
        }
        for x in layers
    ]
    attach(model, 4, gates=1, tensors=tensors, layers=layers)
    block = model.model.layers[0].mlp
    x = torch.randn(1, 24, model.config.hidden_size, generator=g)
    slots = [FULL.with_slots(budget, rule) for budget in (1.0, 0.5, 0.25)]
    with operating_point(model, point=slots, which=torch.arange(24) % 3):
        mixed = block(x)
    for t in range(24):
        with operating_point(model, point=slots[t % 3]):
            torch.testing.assert_close(block(x[:, t : t + 1])[0, 0], mixed[0, t], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_arranged_model_is_saved_as_it_was(tmp_path):
    model = build("olmoe")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for layer in find_layers(model):
        layer.arrange()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())
