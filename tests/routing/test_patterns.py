"""Plans by shape: golden vectors, ends, rounding to a budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import UsageError
from moe_prism.routing.patterns import pattern_skip, shaped, uniform

LITE = 26  # MoE layers of DeepSeek-V2-Lite, k = 6
V3 = (range(4, 62), 61)  # DeepSeek-V3: layers 4..61 of 61 are MoE, k = 8


def mean_of(stage):
    return sum(stage.layers) / len(stage.layers)


@pytest.mark.parametrize(
    ("b", "h", "e", "p", "counts"),
    [
        # written out by hand: lines from (1, b) over (p, h) to (6, e), half up
        (4, 2, 4, 3, (4, 3, 2, 3, 3, 4)),  # 4, 3, 2, 2.67, 3.33, 4
        (1, 4, 1, 4, (1, 2, 3, 4, 3, 1)),  # 1, 2, 3, 4, 2.5 -> 3, 1
        (4, 1, 4, 1, (4, 2, 2, 3, 3, 4)),  # the line runs 1, 1.6, 2.2, 2.8, 3.4, 4 and layer 1 is forced to 4
        (1, 4, 1, 6, (1, 2, 2, 3, 3, 1)),  # 1, 1.6, 2.2, 2.8, 3.4, and layer 6 is forced to 1
        (4, 1, 1, 6, (4, 3, 3, 2, 2, 1)),  # straight down: 4, 3.4, 2.8, 2.2, 1.6, 1
        (2, 2, 2, 3, (2,) * 6),
    ],
)
def test_golden_vectors(b, h, e, p, counts):
    assert pattern_skip(6, 4, (b, h, e, p)).layers == counts


@pytest.mark.parametrize(
    ("knots", "mean"),
    [
        ((4, 2, 2, 11), 2.4),
        ((4, 2, 2, 16), 2.6),
        ((6, 4, 2, 1), 3.1),
        ((6, 2, 2, 16), 3.2),
        ((6, 4, 2, 6), 3.5),
        ((6, 2, 4, 26), 4.1),
        ((6, 4, 4, 11), 4.4),
        ((6, 4, 2, 26), 4.9),
    ],
)
def test_means_of_published_patterns(knots, mean):
    assert round(mean_of(pattern_skip(LITE, 6, knots)), 1) == mean


@pytest.mark.parametrize(("knots", "mean"), [((8, 2, 8, 30), 4.9), ((2, 8, 2, 30), 5.1)])
def test_the_index_may_run_over_all_layers(knots, mean):
    plan = pattern_skip(58, 8, knots, places=V3)
    assert len(plan.layers) == 58 and round(mean_of(plan), 1) == mean


def test_over_all_layers_the_first_moe_layer_is_on_the_line():
    assert pattern_skip(3, 4, (4, 1, 1, 4), places=((2, 3, 4), 4)).layers == (3, 2, 1)
    assert pattern_skip(3, 4, (4, 1, 1, 3)).layers == (4, 3, 1)  # 4, 2.5 -> 3, 1


@pytest.mark.parametrize(
    ("rounding", "counts"), [("half-up", (4, 3, 3, 2, 2, 1)), ("floor", (4, 3, 2, 2, 1, 1)), ("ceil", (4, 4, 3, 3, 2, 1))]
)
def test_roundings(rounding, counts):
    assert pattern_skip(6, 4, (4, 1, 1, 6), rounding=rounding).layers == counts


def test_largest_remainders_meet_a_budget():
    lines = (6, 4, (4, 1, 1, 6))  # 4, 3.4, 2.8, 2.2, 1.6, 1 add up to 15
    assert pattern_skip(*lines, rounding="budget").layers == (4, 3, 3, 2, 2, 1)
    assert pattern_skip(*lines, rounding="budget", total=14).layers == (4, 3, 3, 2, 1, 1)
    assert pattern_skip(*lines, rounding="budget", total=16).layers == (4, 4, 3, 2, 2, 1)


knots = st.tuples(*[st.integers(1, 8)] * 3)


@given(layers=st.integers(1, 40), k=st.integers(1, 8), knots=knots, place=st.floats(0, 1), share=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_every_pattern_is_a_plan(layers, k, knots, place, share):
    b, h, e = knots
    p = 1 + round(place * (layers - 1))
    free = pattern_skip(layers, k, (b, h, e, p)).layers
    assert all(1 <= n <= k for n in free)
    if layers > 1:
        assert (free[0], free[-1]) == (min(b, k), min(e, k))  # the ends win
    if 1 < p < layers:
        assert free[p - 1] == min(h, k)
    total = layers + round(share * (k - 1) * layers)
    exact = pattern_skip(layers, k, (b, h, e, p), rounding="budget", total=total).layers
    assert sum(exact) == total and all(1 <= n <= k for n in exact)


@given(layers=st.integers(2, 30), k=st.integers(2, 8), share=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_shapes_meet_their_mean(layers, k, share):
    mean = 1 + share * (k - 1)
    plans = {shape: shaped(layers, k, shape, mean) for shape in ("descending", "ascending", "peak", "valley")}
    assert {sum(plan.layers) for plan in plans.values()} == {round(mean * layers)}
    down = plans["descending"].layers
    assert list(down) == sorted(down, reverse=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: uniform(6, 4, 5),
        lambda: uniform(6, 4, 0),
        lambda: pattern_skip(6, 4, (4, 2, 1, 7)),
        lambda: pattern_skip(6, 4, (4, 2, 1, 0)),
        lambda: pattern_skip(6, 4, (4, 2, 1, 3), rounding="nearest"),
        lambda: pattern_skip(6, 4, (4, 2, 1, 3), total=12),
        lambda: pattern_skip(6, 4, (4, 2, 1, 3), rounding="budget", total=25),
        lambda: pattern_skip(6, 4, (4, 2, 1, 3), rounding="budget", total=5),
        lambda: shaped(6, 4, "zigzag", 2),
        lambda: shaped(6, 4, "peak", 9),
    ],
)
def test_bad_input(call):
    with pytest.raises(UsageError):
        call()
