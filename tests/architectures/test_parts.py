"""What each architecture adds to training, against a plain computation."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moe_prism.architectures.base import ChosenPairs, LayerRouting, StepPlace, StepSeen
from moe_prism.architectures.elastic import block_norms, cutoffs
from moe_prism.architectures.parts import StraightThrough, even, experts_of
from moe_prism.architectures.sinkhorn import plan
from moe_prism.errors import UsageError
from moe_prism.training.loop import Recorder
from tests.architectures.small import VOCABULARY, example, logits_of, model_of, trained


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


def test_budgets_are_drawn_between_the_least_and_the_most():
    (part,) = example("elastic", least=0.3, most=0.5).parts()
    seen = []

    def again():
        seen.append(part.budgets)
        return torch.zeros(2, 500, 7)

    part.loss(StepSeen(StepPlace(0, 10, 0), torch.zeros(2, 500), torch.zeros(2, 500, 7), [], again=again))
    assert 0.3 <= float(seen[0].min()) < 0.305 < 0.495 < float(seen[0].max()) <= 0.5
    with pytest.raises(UsageError, match=r"above settings\.most"):
        example("elastic", least=0.6, most=0.5).config(VOCABULARY)


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


def test_experts_of_three_values_begin_as_the_dense_layer_and_are_stored_without_an_error(tmp_path):
    from moe_prism.architectures.mote import ternary
    from moe_prism.compress.codec.signs import Ternary
    from moe_prism.model import load_model

    model, (through, upcycled) = model_of(example("mote")), example("mote").parts()
    through.start(model)
    block, x = model.model.layers[0].mlp, torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    upcycled.begin(model, StepPlace(2, 10, 0))
    assert torch.equal(block(x), block.shared_expert(x)) and not block.experts.down_proj.requires_grad
    upcycled.begin(model, StepPlace(5, 10, 0))
    dense = block.shared_expert
    assert torch.equal(block.experts.down_proj[3], dense.down_proj.weight) and not dense.down_proj.weight.requires_grad
    for part in (through, upcycled):
        part.finish(model)
    down = block.experts.down_proj.detach()
    assert torch.equal(down, ternary(dense.down_proj.weight[None]).expand_as(down).detach())
    trained(tmp_path / "out", "mote")
    for module in experts_of(load_model(tmp_path / "out")):
        for parameter in module.parameters():
            assert all(len(matrix.abs().unique()) <= 3 for matrix in parameter)  # 0, and the sizes of gate and up
            groups = parameter.detach().unflatten(-1, (-1, 4))
            numbers = Ternary().fit(groups, 1.6)
            assert torch.equal(Ternary().value(Ternary().code(groups, numbers, 1.6), numbers, 1.6), groups)


def texts(length=9):
    return torch.randint(1, 64, (2, length), generator=torch.Generator().manual_seed(3))


LOOKING = [
    ("graph-of-tokens", {}), ("graph-of-tokens", {"by": "attention"}),
    ("union-of-experts", {}), ("union-of-experts", {"selection": "data"}), ("read-me", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), LOOKING)
@torch.no_grad()
def test_routers_that_look_back_say_the_same_token_by_token_and_see_nothing_ahead(name, settings):
    model, ids = model_of(example(name, **settings)), texts()
    whole = model(input_ids=ids, use_cache=False).logits
    changed = ids.clone()
    changed[:, 6:] = 5
    seen = model(input_ids=changed, use_cache=False).logits[:, :6]
    torch.testing.assert_close(seen, whole[:, :6], atol=1e-5, rtol=0)
    cache, steps = None, []
    for part in (ids[:, :4], *ids[:, 4:].split(1, 1)):
        found = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        steps.append(found.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    beside = model(input_ids=padded, attention_mask=mask, position_ids=places, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(beside, whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_experts_of_all_layers_are_known_before_the_first_one_runs():
    model, ids = model_of(example("read-me")), texts()

    def choices():
        recorder = Recorder(model)
        with recorder.recording() as found:
            model(input_ids=ids, use_cache=False)
        recorder.close()
        return torch.stack([routing.logits for routing in found])

    before = choices()
    for name, parameter in model.named_parameters():
        if "self_attn" in name or "experts" in name:
            parameter.neg_()
    assert torch.equal(choices(), before) and not torch.equal(before[0], before[1])
    model.model.ahead.attend.weight.neg_()  # what is seen of other tokens counts
    assert not torch.allclose(choices(), before, atol=1e-4)


@pytest.mark.parametrize("by", ["similarity", "attention"])
def test_scores_mixed_over_tokens_are_those_of_the_formula(by):
    model, ids = model_of(example("graph-of-tokens", by=by, share=0.3)), texts()
    kept = {}
    layer = model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda _m, given: kept.update(x=given[0].detach()))
    layer.self_attn.register_forward_hook(lambda _m, _given, output: kept.update(attended=output[1]))
    layer.mlp.gate.register_forward_hook(lambda _m, _given, output: kept.update(p=output[0].detach().exp()))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    x, gate = kept["x"], layer.mlp.gate
    own = (x @ gate.weight.T).softmax(-1)
    wanted = torch.zeros_like(own)
    for b in range(2):
        for i in range(x.shape[1]):
            if by == "attention":
                shares = kept["attended"][b, :, i, : i + 1].mean(0)
            else:
                shares = (torch.stack([x[b, i] @ gate.likeness @ x[b, j] for j in range(i + 1)]) / 4).softmax(-1)
            wanted[b, i] = 0.7 * own[b, i] + 0.3 * (shares[:, None] * own[b, : i + 1]).sum(0)
    torch.testing.assert_close(kept["p"], wanted.flatten(0, 1), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(kept["p"].sum(-1), torch.ones(18), atol=1e-5, rtol=0)


def test_slices_follow_the_mean_of_a_text_or_take_its_highest_tokens():
    model = model_of(example("union-of-experts"))
    gate, x = model.model.layers[0].mlp.gate, torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    gates, ids = (found.detach() for found in gate(x)[1:])
    for row, (text, i) in enumerate((t, i) for t in range(2) for i in range(7)):
        scores = gate.weight @ x[text, : i + 1].mean(0)
        assert set(ids[row].tolist()) == set(scores.topk(2).indices.tolist())
    assert torch.allclose(gates.sum(1), torch.full((14,), 2.0))
    gate = model_of(example("union-of-experts", selection="data")).model.layers[0].mlp.gate
    gates, ids = (found.detach() for found in gate(x)[1:])
    scores = x @ gate.weight.T
    for row, (text, i) in enumerate((t, i) for t in range(2) for i in range(7)):
        places = -(-(i + 1) // 2)  # two of four slices: half of the tokens
        for e in range(4):
            taken = int((scores[text, : i + 1, e] > scores[text, i, e]).sum()) < places
            assert (int(ids[row, e]) == e) is taken and (float(gates[row, e]) > 0) is taken


def test_patches_come_back_where_they_were():
    model = model_of(example("dit-moe", patch=4))
    pixels = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    seen = {}
    model.embed_patches.register_forward_pre_hook(lambda _m, given: seen.update(patches=given[0]))
    model.lm_head.register_forward_hook(lambda _m, _given, _out: seen["patches"])  # what is said is what was shown
    with torch.no_grad():
        said = model(pixels=pixels, time=torch.tensor([0.1, 0.8]), classes=torch.tensor([3, 10]))
    assert torch.equal(said, pixels)
    assert torch.equal(seen["patches"][0, 1, :4], pixels[0, 4:8])  # the first row of the second patch


def test_a_velocity_that_is_known_draws_the_picture():
    from moe_prism.architectures.dit_moe import draw_pictures

    class Known:
        config = example("dit-moe").config(VOCABULARY)

        def __call__(self, pixels, time, classes):
            return (torch.full_like(pixels, 0.5) - pixels) / (1 - time[:, None])

    assert torch.allclose(draw_pictures(Known(), [1, 2], steps=7), torch.full((2, 8, 8), 0.5), atol=1e-5)


def test_held_out_digits_are_never_trained_on():
    pytest.importorskip("sklearn")
    task = example("dit-moe").task()
    train, held, documents = task.examples()
    assert len(train) + len(held) == 1797 and len(documents) == 1 and float(train[:, :-1].abs().max()) == 1
    assert not {tuple(row) for row in held.tolist()} & {tuple(row) for row in train.tolist()}


def test_shared_experts_and_routed_ones_add_up_in_a_model_that_draws():
    model = model_of(example("dit-moe"))
    block, x = model.layers[0].mlp, torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    _, weights, ids = block.gate(x[0])
    assert weights.sum(-1).max() < 1  # probabilities as they are
    routed = block.experts(x[0], ids, weights)
    torch.testing.assert_close(block(x)[0], routed + block.shared_expert(x[0]), atol=1e-6, rtol=1e-5)


def test_all_heads_with_gates_of_one_are_plain_attention_and_others_give_nothing():
    chosen, plain = (model_of(example("union-of-experts", heads=heads, unit=True)) for heads in (2, None))
    plain.load_state_dict(chosen.state_dict(), strict=False)
    assert torch.equal(logits_of(chosen), logits_of(plain))
    model, seen = model_of(example("union-of-experts", heads=1, unit=True)), []
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _m, given: seen.append(given[0].detach()))
    logits_of(model)
    there = seen[0].view(2, 20, 2, 8).abs().sum(-1) > 0
    assert (there.sum(-1) == 1).all() and there[..., 0].any() and there[..., 1].any()
