"""Both executors against the family's own forward and against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic import LayerParts
from moe_prism.elastic.execute.plain import grouped, reference, whole_experts
from moe_prism.model import find_layers
from tests.parity.families import build

LAYOUTS = ["olmoe", "gpt_oss", "aria", "nemotron_h"]  # concatenated, interleaved with bias, transposed, ungated


@pytest.fixture(scope="module", params=LAYOUTS)
def plan(request):
    layer = find_layers(build(request.param), dense=False)[0]
    return LayerParts(layer, 4, 0)


def batch(plan, tokens, k, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, plan.layer.hidden, generator=g)
    index = torch.stack([torch.randperm(plan.layer.num_experts, generator=g)[:k] for _ in range(tokens)])
    weight = torch.rand(tokens, k, generator=g)
    return x, index, weight, g


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max() + 1e-6))


@torch.no_grad()
def test_d03_all_slots_kept_is_the_stock_layer(plan):
    x, index, weight, _ = batch(plan, 9, 2, 0)
    keep = torch.ones(9, 2, 4, dtype=torch.bool)
    expected = plan.layer.stock(x, index, weight)
    close(reference(plan, x, index, weight, keep), expected)
    close(grouped(plan, x, index, weight, keep), expected)


@torch.no_grad()
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 40), share=st.floats(0, 1), wide=st.booleans())
@settings(max_examples=25, deadline=None)
def test_d03_vectorised_forms_equal_the_reference(plan, seed, tokens, share, wide):
    x, index, weight, g = batch(plan, tokens, 2, seed)
    keep = torch.rand(tokens, 2, 4, generator=g) < share
    expected = reference(plan, x, index, weight, keep)
    close((whole_experts if wide else grouped)(plan, x, index, weight, keep), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_number_types(dtype):
    """float64 has no grouped product in torch, and is padded instead."""
    layer = find_layers(build("gpt_oss").to(dtype), dense=False)[0]
    plan = LayerParts(layer, 4, 0)
    x, index, weight, g = batch(plan, 12, 2, 5)
    keep = torch.rand(12, 2, 4, generator=g) < 0.5
    x, weight = x.to(dtype), weight.to(dtype)
    expected = reference(plan, x, index, weight, keep)
    for way in (grouped, whole_experts):
        found = way(plan, x, index, weight, keep)
        assert found.dtype == dtype
        assert (found - expected).norm() < (1e-6 if dtype == torch.float64 else 2e-2) * expected.norm()


@torch.no_grad()
def test_nothing_kept_gives_zero(plan):
    x, index, weight, _ = batch(plan, 3, 2, 1)
    keep = torch.zeros(3, 2, 4, dtype=torch.bool)
    assert grouped(plan, x, index, weight, keep).abs().max() == 0


@torch.no_grad()
def test_skipped_ids_cost_and_add_nothing(plan):
    x, index, weight, _ = batch(plan, 5, 2, 2)
    index[:, 1] = -1
    keep = torch.ones(5, 2, 4, dtype=torch.bool) & (index >= 0)[:, :, None]
    close(grouped(plan, x, index, weight, keep), plan.layer.stock(x, index[:, :1], weight[:, :1]))


@torch.no_grad()
def test_arranging_the_weights_changes_no_value(plan):
    x, index, weight, g = batch(plan, 7, 2, 4)
    keep = torch.rand(7, 2, 4, generator=g) < 0.6
    before, stock = reference(plan, x, index, weight, keep), plan.layer.stock(x, index, weight)
    shape = plan.layer.module.down_proj.shape
    plan.layer.arrange()
    assert plan.layer.module.down_proj.shape == shape
    close(grouped(plan, x, index, weight, keep), before)
    close(plan.layer.native(x, index, weight), stock)
