"""Selection rules against brute force."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic import LayerParts, Slots
from moe_prism.elastic.rules import rules
from moe_prism.elastic.rules.layer_budgets import budget_steps
from moe_prism.elastic.rules.pattern import counts
from moe_prism.elastic.rules.threshold import QUANTILES, dropped_energy, fit_cutoffs, pool_cutoffs
from moe_prism.elastic.rules.top_slots import top_slots
from moe_prism.errors import UsageError
from moe_prism.model import find_layers
from moe_prism.point import SlotRule, Toll
from tests.parity.families import build

N, K = 4, 3


@pytest.fixture(scope="module")
def plan():
    plan = LayerParts(find_layers(build("olmoe"))[0], N, 0)
    g = torch.Generator().manual_seed(5)
    plan.tensors["cutoffs"] = fit_cutoffs(torch.rand(4000, generator=g), torch.ones(4000))
    plan.tensors["layer_budgets"] = budget_steps([0, 1, *[0] * 5, *[1] * 11, *[0] * 6], 2)[0]
    return plan


def slots(seed, tokens=6, invalid=False):
    g = torch.Generator().manual_seed(seed)
    weight, norms = torch.rand(tokens, K, generator=g), torch.rand(tokens, K, N, generator=g)
    index = torch.arange(K).expand(tokens, K)
    valid = torch.ones(tokens, K, dtype=torch.bool)
    if invalid:
        valid[:, -1] = False
    return Slots(torch.zeros(tokens, 2), index, weight, valid, N, lambda: norms), weight, norms


@pytest.mark.parametrize(
    "rule", ["product", "threshold", "batch-blocks", "first-slot", "layer-budgets", "mass", "pattern", "whole-experts"]
)
@given(seed=st.integers(0, 500), budget=st.floats(0.01, 1), invalid=st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_rule_keeps_one_and_all_at_full(plan, rule, seed, budget, invalid):
    s, _, _ = slots(seed, invalid=invalid)
    made = rules.get(rule)(plan)
    keep = made.keep(s, torch.full((6,), budget))
    assert (keep.flatten(1).sum(1) >= 1).all()
    assert not keep[~s.valid].any()
    full = made.keep(s, torch.ones(6))
    assert torch.equal(full, s.valid[:, :, None].expand_as(full))


@given(seed=st.integers(0, 500), count=st.integers(1, K * N))
@settings(max_examples=50, deadline=None)
def test_product_keeps_the_largest_values(plan, seed, count):
    s, weight, norms = slots(seed)
    keep = rules.get("product")(plan).keep(s, torch.full((6,), count / (K * N)))
    value = (weight[:, :, None] * norms).flatten(1).numpy()
    for t in range(6):
        expected = np.sort(np.argsort(-value[t], kind="stable")[:count])
        assert np.array_equal(np.flatnonzero(keep[t].flatten().numpy()), expected)


def test_budgets_differ_per_token(plan):
    s, _, _ = slots(1)
    keep = rules.get("product")(plan).keep(s, torch.tensor([1 / 12, 2 / 12, 6 / 12, 9 / 12, 11 / 12, 1.0]))
    assert keep.flatten(1).sum(1).tolist() == [1, 2, 6, 9, 11, 12]


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_whole_experts_at_multiples_is_plain_top_k(plan, experts):
    s, weight, _ = slots(3)
    keep = rules.get("whole-experts")(plan).keep(s, torch.full((6,), experts / K))
    top = weight.topk(experts, dim=1).indices
    expected = torch.zeros(6, K, dtype=torch.bool).scatter_(1, top, True)
    assert torch.equal(keep, expected[:, :, None].expand(-1, -1, N))


def test_pattern_reproduces_the_published_lists():
    assert counts(16, 8, 4) == [4, 4, 4, 3, 1, 0, 0, 0]
    assert counts(16, 6, 4) == [4, 4, 4, 3, 1, 0]
    assert counts(24, 8, 4) == [4, 4, 4, 4, 4, 3, 1, 0]
    assert counts(8, 4, 4) == [4, 3, 1, 0]


@given(n=st.integers(1, 8), k=st.integers(1, 8), data=st.data())
def test_pattern_counts_add_up(n, k, data):
    total = data.draw(st.integers(0, n * k))
    row = counts(total, k, n)
    assert len(row) == k and sum(row) == total and max(row) <= n and row == sorted(row, reverse=True)


def test_threshold_keeps_the_budget_on_average(plan):
    g = torch.Generator().manual_seed(9)
    tokens = 4000
    weight, norms = torch.ones(tokens, K), torch.rand(tokens, K, N, generator=g)
    valid = torch.ones(tokens, K, dtype=torch.bool)
    s = Slots(torch.zeros(tokens, 2), torch.zeros(tokens, K, dtype=torch.long), weight, valid, N, lambda: norms)
    for budget in (0.25, 0.5, 0.8):
        keep = rules.get("threshold")(plan).keep(s, torch.full((tokens,), budget))
        assert abs(float(keep.float().mean()) - budget) < 0.03


def test_levels_follow_importance():
    values = torch.tensor([1.0, 2.0, 3.0])
    level = fit_cutoffs(values, torch.tensor([1.0, 1.0, 8.0]))
    assert level[0] == 3 and level[QUANTILES // 2] == 3 and level[-1] == 1
    assert (level.diff() <= 0).all()


def test_names_of_earlier_versions_are_taken_and_not_listed():
    for old, new in (("plan", "layer-budgets"), ("linear", "whole-experts")):
        assert rules.get(old) is rules.get(new) and new in rules.names() and old not in rules.names()


def test_ties_go_to_the_first_slot():
    keep = top_slots(torch.ones(1, 2, 2), torch.tensor([3]))
    assert keep.flatten().tolist() == [True, True, True, False]


def test_pooled_levels_spend_where_it_costs_least():
    """Brute force: two layers, dropping half of all slots with the least sum of c v^2 is one level for sqrt(c) v."""
    g = torch.Generator().manual_seed(3)
    values = [torch.rand(2000, generator=g), 5 * torch.rand(2000, generator=g)]
    sensitivity = [4.0, 0.01]
    own = [fit_cutoffs(v, torch.ones_like(v)) for v in values]
    pooled = pool_cutoffs(own, sensitivity)
    kept = [v >= level[QUANTILES // 2] for v, level in zip(values, pooled, strict=True)]
    assert abs(sum(float(k.float().mean()) for k in kept) / 2 - 0.5) < 0.02
    price = torch.cat([c * v.square() for c, v in zip(sensitivity, values, strict=True)])
    best = price.sort().values[:2000].sum()
    ours = sum(float((c * v.square())[~k].sum()) for c, v, k in zip(sensitivity, values, kept, strict=True))
    assert ours < 1.05 * float(best)


def test_dropped_energy_is_the_mean_square_below_the_level():
    values = torch.rand(50_000, generator=torch.Generator().manual_seed(1))
    levels = fit_cutoffs(values, torch.ones_like(values))
    exact = float(values[values < levels[QUANTILES // 2]].square().sum()) / len(values)
    assert abs(dropped_energy(levels, 0.5) - exact) < 0.03 * exact


@given(seed=st.integers(0, 300), share=st.floats(0.05, 0.99))
@settings(max_examples=30, deadline=None)
def test_mass_keeps_the_fewest_slots_that_cover_the_share(plan, seed, share):
    s, weight, norms = slots(seed)
    keep = rules.get("mass")(plan).keep(s, torch.full((6,), share, dtype=torch.float64)).flatten(1)
    values = (weight[:, :, None] * norms).flatten(1).double()
    for t in range(6):
        total, kept = values[t].sum(), values[t][keep[t]]
        assert kept.sum() >= share * total * (1 - 1e-9)
        if len(kept) > 1:
            assert kept.sum() - kept.min() < share * total * (1 + 1e-9)


@given(seed=st.integers(0, 300), budget=st.floats(0.2, 0.9), toll=st.sampled_from([0.0, 0.5, 8.0]))
@settings(max_examples=20, deadline=None)
def test_first_slot_is_the_cheapest_choice_by_brute_force(plan, seed, budget, toll):
    """Of every subset of an expert's slots: u for each one left out, 1 for each one kept, and the toll once."""
    s, weight, norms = slots(seed)
    made = rules.get("first-slot")(plan, Toll(price=toll))
    keep = made.keep(s, torch.full((6,), budget))
    level = made.level(torch.tensor([budget])).item()
    for t, j in product(range(6), range(K)):
        u = (weight[t, j] * norms[t, j] / level).double().square()
        costs = {m: float(u[~torch.tensor(m)].sum()) + sum(m) + toll * any(m) for m in product((False, True), repeat=N)}
        chosen = tuple(keep[t, j].tolist())
        if chosen not in ((False,) * N, min(costs, key=costs.get)):
            assert sum(chosen) == 1, "only the token's best slot may be kept against the sum"
        elif not any(chosen):
            assert min(costs.values()) >= costs[chosen] - 1e-6


@pytest.mark.parametrize("devices", [1, 2])
@given(seed=st.integers(0, 300), budget=st.floats(0.2, 0.9), toll=st.sampled_from([0.5, 2.0, 8.0]))
@settings(max_examples=10, deadline=None)
def test_a_toll_on_devices_is_paid_once_for_all_experts_there_by_brute_force(plan, devices, seed, budget, toll):
    """Experts 0, 1 and the last: with two devices the first two share one. Every way to visit devices, with the best slots of each."""
    s, weight, norms = slots(seed)
    experts = plan.layer.num_experts
    index = [0, 1, experts - 1]
    s = replace(s, index=torch.tensor(index).expand(6, K))
    made = rules.get("first-slot")(plan, Toll(price=toll, devices=devices))
    keep = made.keep(s, torch.full((6,), budget))
    level = made.level(torch.tensor([budget])).item()
    place = [e * devices // experts for e in index]
    assert place == [0, 0, devices - 1]
    for t in range(6):
        u = (weight[t, :, None] * norms[t] / level).double().square()
        costs = {}
        for visited in product((False, True), repeat=devices):
            there = torch.tensor([visited[p] for p in place])[:, None]
            costs[visited] = float(torch.where(there, u.clamp(max=1), u).sum()) + toll * sum(visited)
        chosen = keep[t].any(1)
        visited = tuple(any(bool(chosen[e]) for e in range(K) if place[e] == d) for d in range(devices))
        spent = float(torch.where(keep[t], 1.0, u).sum()) + toll * sum(visited)
        best = int((weight[t, :, None] * norms[t]).argmax())
        there = [j for j in range(K) if place[j] == place[best // N]]
        if keep[t][there].sum() == 1:  # a token's best slot is kept against the sum too, and pays for its device
            spent -= max(0.0, 1.0 - float(u.flatten()[best]) + toll)
        assert spent == pytest.approx(min(costs.values()), rel=1e-6)


def test_a_toll_that_no_rule_or_layer_knows_is_refused(plan):
    with pytest.raises(UsageError, match="knows no toll"):
        SlotRule(rule="threshold", budget=0.5, toll=Toll(price=1))
    experts = plan.layer.num_experts
    with pytest.raises(UsageError, match=f"{experts + 1} devices, and a layer has {experts}"):
        rules.get("first-slot")(plan, Toll(price=1, devices=experts + 1))
    for price in (-1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="toll"):
            Toll(price=price)
    point = SlotRule(rule="first-slot", budget=0.5, toll=Toll(price=6, devices=8))
    assert SlotRule.from_json(point.to_json()) == point
    assert "toll" not in SlotRule(rule="first-slot", budget=0.5).to_json()


@given(data=st.data(), layers=st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_layer_budgets_meet_the_dial_on_average_over_layers(plan, data, layers):
    total = K * N
    tail = data.draw(st.permutations([layer for layer in range(layers) for _ in range(total - 1)]))
    order = [*range(layers), *tail]
    made = []
    for steps in budget_steps(order, layers):
        assert (steps.diff() >= 0).all()
        made.append(rules.get("layer-budgets")(LayerParts(plan.layer, N, 0, {"layer_budgets": steps})))
    s, _, _ = slots(2)
    before = [0] * layers
    for m in range(layers, layers * total + 1):
        keep = [rule.keep(s, torch.full((6,), m / (layers * total))).flatten(1) for rule in made]
        counts_now = [int(k.sum(1)[0]) for k in keep]
        assert all((k.sum(1) == c).all() for k, c in zip(keep, counts_now, strict=True))
        assert sum(counts_now) == m  # the mean over layers is the dial
        assert counts_now == [order[:m].count(layer) for layer in range(layers)]
        assert all(now >= then for now, then in zip(counts_now, before, strict=True))
        before = counts_now


def test_dials_of_layer_budgets_may_differ_per_token(plan):
    s, _, _ = slots(1)
    dials = torch.tensor([0.01, 2 / 24, 7 / 24, 13 / 24, 19 / 24, 1.0])
    keep = rules.get("layer-budgets")(plan).keep(s, dials)
    counts_now = keep.flatten(1).sum(1)
    assert counts_now.tolist() == [1, 1, 6, 6, 7, 12]
    assert torch.equal(keep, rules.get("product")(plan).keep(s, counts_now / 12))


def test_a_model_without_a_profile_has_no_layer_budgets(plan):
    with pytest.raises(UsageError, match="no budgets per layer"):
        rules.get("layer-budgets")(LayerParts(plan.layer, N, 0))
