"""The packed layer against the readable reference of `elastic`. Needs no vLLM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moe_prism.elastic import LayerParts, Slots
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.compensate import compensator
from moe_prism.elastic.execute.base import Settled
from moe_prism.elastic.execute.plain import reference
from moe_prism.elastic.rules import rules
from moe_prism.elastic.scorers import scorers
from moe_prism.errors import UsageError
from moe_prism.model import find_layers
from moe_prism.point import FULL, OperatingPoint, RoutingStage, SlotRule, WeightChange
from moe_prism.serve.vllm.layer import PackedElastic, PackedWeights, pack, unknown_side

E, K, D, F = 5, 3, 32, 192  # three columns of 16 values per block: tiles of every width occur


def stored(rows):
    """[E, rows, depth] as vLLM keeps it: packed, and called by its old shape."""
    return pack(rows).view(rows.shape)


def packed_model(first, down, side, activation="silu", n_sub=4, gates=1):
    """A model of one layer, its weights packed."""
    weights = PackedWeights(w13=first, w2=down, activation=activation)
    return PackedElastic(torch.nn.Module(), [("experts", weights)], [side], n_sub=n_sub, gates=gates, k=K)


def make(dtype=torch.float32, n_sub=4, gates=1, means=None):
    """(plan on the family's own weights, the same layer packed)."""
    torch.manual_seed(0)
    holder = torch.nn.Module()
    holder.experts = OlmoeExperts(OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K))
    for p in holder.experts.parameters():
        p.data.normal_(std=p.shape[-1] ** -0.5)
    layer = find_layers(holder)[0]
    ridge = (torch.randn(E, n_sub, D + n_sub * gates + 1) * 0.2).bfloat16()
    side = {"ridge": ridge, "cutoffs": torch.linspace(2.0, 0, 129), "shares": torch.linspace(0, 1, 129)}
    if means is not None:
        side["compensate.mean.vectors"] = means
    first, down = holder.experts.gate_up_proj.data, holder.experts.down_proj.data
    packed = packed_model(stored(first.to(dtype)), stored(down.to(dtype)), side, n_sub=n_sub, gates=gates)
    return LayerParts(layer, n_sub, gates, side), packed


@pytest.fixture(scope="module", params=[0, 1, 2])
def pair(request):
    return make(gates=request.param)


def batch(tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, E, generator=g).topk(K, dim=1).indices
    return torch.randn(tokens, D, generator=g), index, torch.rand(tokens, K, generator=g)


def selected(plan, x, index, weight, budget, rule="threshold"):
    """keep by the tensor forms of `elastic`."""
    scorer = scorers.get("ridge")(plan)
    slots = Slots(x, index, weight, torch.ones_like(index, dtype=torch.bool), plan.n_sub, lambda: scorer(x, index))
    return rules.get(rule)(plan).keep(slots, budget)


def at(packed, budget):
    """The step of one budget per token [T], under the default rule."""
    packed.step = Step(bind(packed, [FULL.with_slots(0.5)]), 0, budget)
    return packed


def run(packed, x, index, weight, budget):
    return at(packed, budget).run(0, x, index, weight)


def computed(packed, x, index, weight, keep):
    """The kept slots [T, k, N], and what makes up for the others where there is anything."""
    layer = packed.layers[0]
    fix = layer.compensator
    out = layer.executor.run(x, index, weight if fix is None else fix.weights(index, weight, keep), Settled(keep))
    return out if fix is None else out + fix(x, index, weight, keep)


@torch.no_grad()
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 24), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_run_is_the_sum_of_the_kept_slots(pair, seed, tokens, share):
    plan, packed = pair
    x, index, weight = batch(tokens, seed)
    keep = torch.rand(tokens, K, 4, generator=torch.Generator().manual_seed(seed)) < share
    found = computed(packed, x, index, weight, keep)
    torch.testing.assert_close(found, reference(plan, x, index, weight, keep), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_means_stand_in_for_what_is_dropped():
    means = (torch.randn(E, 4, D, generator=torch.Generator().manual_seed(3)) * 0.3).bfloat16()
    plan, packed = make(means=means)
    x, index, weight = batch(40)
    keep = torch.rand(40, K, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = reference(plan, x, index, weight, keep) + compensator(plan)(x, index, weight, keep)
    torch.testing.assert_close(computed(packed, x, index, weight, keep), expected, rtol=1e-4, atol=1e-5)
    budget = torch.full((40,), 0.5)
    chosen = selected(plan, x, index, weight, budget)
    assert not torch.equal(chosen, torch.ones_like(chosen))
    through = reference(plan, x, index, weight, chosen) + compensator(plan)(x, index, weight, chosen)
    torch.testing.assert_close(run(packed, x, index, weight, budget), through, rtol=1e-4, atol=1e-5)


def test_what_is_not_computed_here_is_named():
    one = torch.zeros(1)
    assert unknown_side({"ridge": one, "compensate.mean.vectors": one, "compensate.low-rank.mean": one}) is None
    assert unknown_side({"repair": one}) == "a repaired W_down"


@torch.no_grad()
def test_selection_is_that_of_the_embedded_engine(pair):
    plan, packed = pair
    x, index, weight = batch(200)
    budget = torch.linspace(0.05, 1, 200)
    found = packed.layers[0].kept(at(packed, budget).step, x, index, weight)
    assert torch.equal(found, selected(plan, x, index, weight, budget))


@torch.no_grad()
def test_rows_that_choose_together_keep_what_they_do_in_memory(pair):
    """And beside them, rows of another rule are as alone."""
    plan, packed = pair
    x, index, weight = batch(24)
    points = [FULL.with_budget(0.4, "batch-blocks"), FULL.with_slots(0.5)]
    which = torch.arange(24) % 2
    packed.step = Step(bind(packed, points), which)
    keep = packed.layers[0].kept(packed.step, x, index, weight)
    mine, others = which == 0, which == 1
    assert torch.equal(keep[mine], selected(plan, x[mine], index[mine], weight[mine], torch.full((12,), 0.4), "batch-blocks"))
    assert torch.equal(keep[others], selected(plan, x[others], index[others], weight[others], torch.full((12,), 0.5)))
    expected = reference(plan, x, index, weight, keep)
    torch.testing.assert_close(packed.run(0, x, index, weight), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_a_token_does_not_depend_on_its_batch(pair, seed):
    """Bit by bit, whatever the others are and want."""
    packed = pair[1]
    x, index, weight = batch(17, seed)
    budget = torch.rand(17, generator=torch.Generator().manual_seed(seed)).clamp(min=0.1)
    together = run(packed, x, index, weight, budget)
    alone = [run(packed, x[i : i + 1], index[i : i + 1], weight[i : i + 1], budget[i : i + 1]) for i in range(17)]
    assert torch.equal(together, torch.cat(alone))


@torch.no_grad()
def test_points_of_several_kinds_share_a_batch(pair):
    """Rules, a routing stage and both: every token as alone."""
    packed = pair[1]
    x, index, weight = batch(17)
    fewer = (RoutingStage(layers=(2,), keep_mass=True),)
    points = [
        FULL.with_budget(0.5),
        FULL.with_budget(0.25, "product"),
        OperatingPoint(routing=fewer),
        OperatingPoint(routing=fewer, slots=SlotRule(budget=0.5)),
    ]
    bound, which = bind(packed, points), torch.arange(17) % 4
    packed.step = Step(bound, which)
    together = packed.run(0, x, index, weight)
    for p in range(4):
        packed.step = Step(bind(packed, [points[p]]))
        alone = packed.run(0, x, index, weight)
        assert torch.equal(together[which == p], alone[which == p])


@torch.no_grad()
def test_threads_share_the_work_and_change_nothing(pair):
    packed = pair[1]
    x, index, weight = batch(300)
    budget = torch.full((300,), 0.6)
    one = run(packed, x, index, weight, budget)
    try:
        torch.set_num_threads(3)
        assert torch.equal(run(packed, x, index, weight, budget), one)
    finally:
        torch.set_num_threads(1)


@torch.no_grad()
def test_bfloat16_weights():
    plan, packed = make(torch.bfloat16)
    x, index, weight = batch(9)
    keep = torch.ones(9, K, 4, dtype=torch.bool)
    found = run(packed, x.bfloat16(), index, weight, torch.ones(9))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), reference(plan, x, index, weight, keep), rtol=0.05, atol=0.02)


def test_refusals():
    plan, _ = make()
    first, down = stored(torch.randn(E, 2 * F, D)), stored(torch.randn(E, D, F))
    with pytest.raises(UsageError, match="relu"):
        packed_model(first, down, plan.tensors, "relu")
    with pytest.raises(UsageError, match="do not fit"):
        packed_model(first, down, plan.tensors, n_sub=8)
    with pytest.raises(UsageError, match="float16"):
        packed_model(first.half(), down.half(), plan.tensors)
    with pytest.raises(UsageError, match="does not belong"):
        packed_model(first, down, plan.tensors, gates=2)


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (OperatingPoint(weights=WeightChange(change="prune")), "it changes the weights"),
        (OperatingPoint(slots=SlotRule(budget=0.5, scorer="oracle")), "the scorer 'oracle'"),
        (OperatingPoint(routing=(RoutingStage(layers=(2,)),)), "leaves open what happens to the routing weights"),
        (OperatingPoint(routing=(RoutingStage(layers=(2,), stage="best", keep_mass=True),)), "best"),
    ],
)
def test_points_that_vllm_does_not_run_are_refused(pair, point, reason):
    with pytest.raises(UsageError, match=reason):
        bind(pair[1], [point])
