"""The runtime: installing, nesting, bad input."""

import pytest
import torch

from moe_prism.elastic import attach, operating_point
from moe_prism.elastic.execute.memory import check_way
from moe_prism.errors import UsageError
from moe_prism.point import OperatingPoint, SlotRule
from tests.parity.families import build

IDS = torch.arange(3, 15)[None]


@pytest.fixture
def model():
    return build("olmoe")


@torch.no_grad()
def test_operating_points_nest_and_restore(model):
    before = model(IDS).logits
    attach(model, 4)
    with operating_point(model, 0.5, rule="whole-experts"):
        half = model(IDS).logits
        with operating_point(model, 1.0):
            torch.testing.assert_close(model(IDS).logits, before)
        torch.testing.assert_close(model(IDS).logits, half)
    torch.testing.assert_close(model(IDS).logits, before)
    assert not torch.allclose(half, before)


@torch.no_grad()
def test_detach_gives_the_model_back(model):
    implementation = model.config._experts_implementation
    elastic = attach(model, 4)
    elastic.detach()
    assert model.config._experts_implementation == implementation
    with pytest.raises(UsageError, match="not elastic"), operating_point(model, 0.5):
        pass


@torch.no_grad()
def test_k_counts_slots(model):
    elastic = attach(model, 4)
    for k in (1, 3, 8):
        with operating_point(model, k=k, rule="whole-experts"), elastic.count():
            model(IDS)
        for layer in elastic.layers:
            assert layer.counter.kept == k * layer.counter.tokens


@torch.no_grad()
def test_counting_ends_with_its_block(model):
    elastic = attach(model, 4)
    counters = lambda: [layer.counter.tokens for layer in elastic.layers]  # noqa: E731
    with pytest.raises(ZeroDivisionError), elastic.count():
        model(IDS)
        1 / 0  # noqa: B018
    counted = counters()
    assert counted == [IDS.numel()] * len(elastic.layers) and not elastic.counting
    with operating_point(model, 0.5, rule="whole-experts"):
        model(IDS)
    assert counters() == counted
    with elastic.count(), elastic.at(elastic.full_step, counting=False):
        model(IDS)
    assert not any(counters()) and not elastic.counting


@torch.no_grad()
def test_budget_per_token_equals_each_alone(model):
    attach(model, 4)
    budgets = torch.linspace(0.2, 1.0, IDS.numel())
    last = model.model.layers[0].mlp  # one layer: later ones see different inputs
    x = torch.randn(1, IDS.numel(), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with operating_point(model, budgets, rule="whole-experts"):
        mixed = last(x)
    for t, budget in enumerate(budgets.tolist()):
        with operating_point(model, budget, rule="whole-experts"):
            torch.testing.assert_close(last(x)[0, t], mixed[0, t])


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, float("nan")])
def test_bad_budgets(model, budget):
    attach(model, 4)
    with pytest.raises(UsageError, match="budget"), operating_point(model, budget):
        pass


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"k": 0}, "k 0 .*1..8"),
        ({"k": 9}, "k 9 .*1..8"),
        ({"k": 2.5}, "whole number"),
        ({"k": 3, "budget": 0.5}, "both"),
        ({"budget": [0.5]}, "not list"),
    ],
)
def test_bad_k(model, given, names):
    attach(model, 4)
    with pytest.raises(UsageError, match=names), operating_point(model, **given):
        pass


def test_unknown_names_list_the_legal_ones(model):
    attach(model, 4)
    with pytest.raises(UsageError, match="choose one of"), operating_point(model, 0.5, rule="best"):
        pass
    for slots in (SlotRule(budget=0.5, rule="best"), SlotRule(budget=0.5, scorer="magic")):
        with pytest.raises(UsageError, match="choose one of"), operating_point(model, point=OperatingPoint(slots=slots)):
            pass
    with pytest.raises(UsageError, match="choose one of"):
        check_way("warp")


@torch.no_grad()
def test_wrong_number_of_budgets(model):
    attach(model, 4)
    with (
        pytest.raises(UsageError, match="3 budgets for 12 tokens"),
        operating_point(model, torch.full((3,), 0.5), rule="whole-experts"),
    ):
        model(IDS)


@pytest.mark.parametrize("n_sub", [5, 0, -2])
def test_width_must_divide(model, n_sub):
    with pytest.raises(UsageError, match=rf"16 neurons of '.*' do not split into {n_sub} .* choose n_sub from \[2, 4, 8, 16\]"):
        attach(model, n_sub)
