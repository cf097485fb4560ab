"""What each architecture adds to training, against a plain computation."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moe_prism.architectures.base import ChosenPairs, LayerRouting, StepPlace, StepSeen
from moe_prism.architectures.elastic import block_norms, cutoffs
from moe_prism.architectures.parts import StraightThrough, even, experts_of
from moe_prism.architectures.sinkhorn import plan
from tests.architectures.small import example, logits_of, model_of


def routing(tokens=64, columns=4, k=2, seed=0):
    logits = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    weights, ids = logits.softmax(-1).topk(k, -1)
    return LayerRouting(logits, weights, ids)


def seen(*routings):
    return StepSeen(StepPlace(0, 1, 0), torch.zeros(1, 1), torch.zeros(1, 1, 4), routings, again=lambda: torch.zeros(1, 1, 4))


def test_even_routing_has_a_balance_of_one_and_skewed_a_larger_one():
    same = LayerRouting(torch.zeros(4, 4), torch.ones(4, 1), torch.arange(4)[:, None])
    assert even(same).item() == pytest.approx(1.0)
    skewed = LayerRouting(torch.tensor([[4.0, 0, 0, 0]]).expand(4, 4), torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.long))
    assert even(skewed) > 2


def test_a_plan_has_even_columns_and_rows_of_one():
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    found = plan(scores, 0.7, 200)
    assert torch.allclose(found.sum(0), torch.full((3,), 2.0), atol=1e-4)
    assert torch.allclose(found.sum(1), torch.ones(6), atol=1e-4)
    assert torch.allclose(plan(torch.zeros(6, 3), 0.7, 200), torch.full((6, 3), 1 / 3), atol=1e-6)


def test_a_cold_plan_is_the_best_even_assignment():
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    places = np.repeat(scores.numpy(), 2, axis=1)  # two places per expert
    rows, columns = linear_sum_assignment(-places)
    assert plan(scores, 0.02, 5000).argmax(1).tolist() == [int(c) // 2 for _, c in sorted(zip(rows, columns, strict=True))]


def test_null_experts_count_as_their_mean():
    from moe_prism.architectures.adamoe import NullBalance

    one = routing(columns=6)
    share, probability = one.chosen.mean(0), one.logits.softmax(-1).mean(0)
    flat = torch.cat([share[:4], share[4:].mean().repeat(2)])
    assert NullBalance(0.5, 4).loss(seen(one)).item() == pytest.approx(0.5 * 6 * float((flat * probability).sum()), rel=1e-5)


def test_a_token_of_null_experts_alone_passes_as_it_is():
    model = model_of(example("adamoe", nulls=4))
    block = model.model.layers[0].mlp
    with torch.no_grad():
        block.gate.weight[:4] = 0
        block.gate.weight[4:] = torch.ones(4, 16)
    assert torch.equal(block(torch.ones(1, 3, 16)), torch.zeros(1, 3, 16))


def test_copies_and_constants_add_what_they_say():
    model = model_of(example("moe-plus-plus", zeros=1, copies=1, constants=1))
    block = model.model.layers[0].mlp
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[0.25, 0.75]]).expand(5, 2)
    copy = block.beside(x, torch.tensor([[4, 5]]).expand(5, 2), weights)
    assert torch.allclose(copy, 0.75 * x)
    shares = (block.mix[0] @ x.T).softmax(0)
    constant = block.beside(x, torch.tensor([[4, 6]]).expand(5, 2), weights)
    wanted = 0.75 * (shares[0][:, None] * x + shares[1][:, None] * block.constants[0])
    assert torch.allclose(constant, wanted, atol=1e-6)


def test_more_experts_of_a_group_open_along_the_formula():
    (part,) = example("rexmoe", begin=0.1, end=0.6).parts()
    assert [part.count(share) for share in (0.0, 0.1, 0.35, 0.6, 1.0)] == [4, 4, 6, 8, 8]
    model = model_of(example("rexmoe"))
    part.begin(model, StepPlace(0, 10, 0))
    closed = model.model.layers[0].mlp.gate.closed
    assert int(closed.sum()) == 4
    _, _, ids = model.model.layers[0].mlp.gate(torch.randn(9, 16))
    assert not closed[ids].any()


def test_experts_of_a_group_cost_no_parameters():
    sizes = [sum(p.numel() for m in experts_of(model_of(example(name))) for p in m.parameters()) for name in ("top-k", "rexmoe")]
    assert sizes[0] == sizes[1]


def test_a_token_takes_the_fewest_experts_that_reach_p():
    model = model_of(example("dynamic-moe", top_p=0.6))
    gate = model.model.layers[0].mlp.gate
    logits, weights, ids = gate(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)))
    for row, weight, own in zip(logits.softmax(-1), weights, ids, strict=True):
        kept = own < 4
        ranked = row.sort(descending=True).values
        assert weight[kept].sum() >= 0.6 and ranked[: int(kept.sum()) - 1].sum() < 0.6
        assert (weight[~kept] == 0).all()


def test_the_entropy_loss_is_the_mean_entropy():
    from moe_prism.architectures.dynamic_moe import EntropyLoss

    one = routing()
    wanted = torch.distributions.Categorical(logits=one.logits).entropy().mean()
    assert EntropyLoss(2.0).loss(seen(one)).item() == pytest.approx(2 * float(wanted), rel=1e-5)


def test_block_norms_are_those_of_what_blocks_add():
    generator = torch.Generator().manual_seed(0)
    a, down = torch.randn(6, 8, generator=generator), torch.randn(3, 5, 8, generator=generator)
    pairs = ChosenPairs(torch.arange(6), torch.zeros(6), torch.ones(6), [(0, 2), (2, 2), (2, 6)], 6, 1)  # one without rows
    found = block_norms(a, down, pairs, 4)
    for row, expert in enumerate([0, 0, 2, 2, 2, 2]):
        for block in range(4):
            own = slice(2 * block, 2 * block + 2)
            assert found[row, block].item() == pytest.approx(float((down[expert][:, own] @ a[row, own]).norm()), rel=1e-4)


def test_a_cutoff_keeps_the_share_of_a_budget():
    values = torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
    for budget in (0.1, 0.5, 1.0):
        level = cutoffs(values, torch.full((100,), budget))[0]
        assert float((values >= level).float().mean()) == pytest.approx(budget, abs=1e-6)


def test_straight_through_experts_compute_rounded_and_end_rounded():
    from moe_prism.training.experts import training_experts

    model, part = model_of(example("top-k")), StraightThrough(torch.sign)
    before = logits_of(model)
    part.start(model)
    with training_experts(model):
        during = logits_of(model)
    assert not torch.allclose(before, during)
    part.finish(model)
    assert all(p.abs().eq(1).all() for m in experts_of(model) for p in m.parameters())
    assert torch.allclose(logits_of(model), during, atol=1e-5)


def test_a_chain_calls_as_many_experts_as_asked_in_all_passes():
    model = model_of(example("chain-of-experts", passes=2))
    assert [one.gate.top_k for one in model.model.layers[0].mlp.passes] == [1, 1]
