"""Bits per expert: the best choice by brute force, what a width costs by its definition, and experts that nobody saw."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize.allocate import Importance, cheapest, width_costs
from moe_prism.errors import UsageError
from moe_prism.methods.quantize.quantmoe import QuantMoe, two_widths
from moe_prism.model import find_layers
from tests.parity.families import build

WIDTHS = (1, 2, 3)


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(1, 6), total=st.integers(1, 18), seed=st.integers(0, 1000), each=st.sampled_from([(), (2,), (2, 3)]))
def test_no_choice_within_the_bits_costs_less(experts, total, seed, each):
    costs = torch.rand(experts, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fitting = [
        choice for choice in itertools.product(range(3), repeat=experts)
        if sum(WIDTHS[c] for c in choice) <= total and all(WIDTHS.index(w) in choice for w in each)
    ]  # fmt: skip
    if not fitting:
        with pytest.raises(UsageError, match="leave no choice"):
            cheapest(costs, WIDTHS, total, each)
        return
    best = min(sum(float(costs[e, c]) for e, c in enumerate(choice)) for choice in fitting)
    found = cheapest(costs, WIDTHS, total, each)
    assert sum(found) <= total and set(each) <= set(found)
    assert sum(float(costs[e, WIDTHS.index(w)]) for e, w in enumerate(found)) == pytest.approx(best)


@pytest.fixture(scope="module")
def seen():
    model = build("olmoe")
    layers = find_layers(model)
    work = Pass(model, layers, Settings(collectors=("counts", "tokens", "rotation")))
    work.run(torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0)))
    return layers, work.statistics()


def test_a_wider_code_costs_less_and_no_bits_cost_all_of_an_expert(seen):
    layers, statistics = seen
    costs = width_costs(layers[0], statistics.layers[0], Rtn(), 32, [0.0, 1.0, 2.0, 4.0, 8.0], Importance(1, 1, 2))
    assert (costs[:, :-1] > costs[:, 1:]).all()
    values = statistics.layers[0].values["counts"]
    share, weight = values["count"] / values["count"].sum(), values["weight_sum"] / values["weight_sum"].sum()
    energy = []
    for e in range(layers[0].num_experts):
        x, g = statistics.layers[0].inputs(e)
        o = layers[0].project(e, layers[0].activations(e, x)).double() * g[:, None]
        energy.append(o.square().sum(1).mean() * values["count"][e])
    expected = share * weight * torch.stack(energy) / torch.stack(energy).sum()
    torch.testing.assert_close(costs[:, 0], expected, rtol=1e-4, atol=1e-12)


def test_an_expert_that_nobody_saw_is_not_free(seen):
    layers, statistics = seen
    own = statistics.layers[0]
    hidden = {name: {k: v.clone() for k, v in state.items()} for name, state in own.values.items()}
    hidden["counts"]["count"][3] = hidden["counts"]["weight_sum"][3] = hidden["tokens"]["kept"][3] = 0
    costs = width_costs(layers[0], type(own)(own.name, hidden), Rtn(), 32, [2.0, 4.0], Importance(0, 0, 2))
    assert (costs[3] > 0).all() and costs[3, 0] > costs[3, 1]
    assert costs[3, 0] < costs[:, 0].max()


def test_a_rule_favours_the_largest_scores_and_says_what_it_does_not_know():
    scores = [torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([30.0, 10.0, 20.0, 40.0])]
    each = two_widths(scores, 3.0, 32, by_layer=True).weights.settings["bits"]
    assert each == [[4.0, 2.0, 4.0, 2.0], [4.0, 2.0, 2.0, 4.0]]
    every = two_widths(scores, 2.5, 32, by_layer=False).weights.settings["bits"]
    assert every == [[2.0] * 4, [4.0, 2.0, 2.0, 4.0]]
    with pytest.raises(UsageError, match="has no rule 'usage'"):
        QuantMoe.read_argument("quantmoe", "usage")
    with pytest.raises(UsageError, match="outside 2 to 4"):
        QuantMoe.read_argument("quantmoe", "rule=first:bits=5")
