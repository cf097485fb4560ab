from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import UsageError
from moe_prism.frontier import distinct_points, hypervolume, largest_cliff, pareto

GRID = st.tuples(st.integers(0, 6), st.integers(0, 6))  # small, so that ties and duplicates are common
CALM = settings(deadline=None, max_examples=60)  # a loaded machine is not a failure
REAL = st.tuples(st.floats(0, 1e6), st.floats(0, 1e6))


def split(points):
    return [p[0] for p in points], [p[1] for p in points]


def dominates(a, b):
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@CALM
@given(st.lists(st.one_of(GRID, REAL), max_size=12))
def test_pareto_is_what_the_definition_says(points):
    assert pareto(*split(points)) == [not any(dominates(q, p) for q in points) for p in points]


def test_equal_points_are_both_kept_and_a_tie_in_one_direction_is_not():
    assert pareto([1, 1, 1, 2], [5, 5, 6, 5]) == [True, True, False, False]


@CALM
@given(st.lists(GRID, max_size=10), st.integers(0, 7), st.integers(0, 7))
def test_hypervolume_counts_dominated_unit_cells(points, x, y):
    cells = sum(any(p[0] <= i and p[1] <= j for p in points) for i in range(x) for j in range(y))
    assert hypervolume(points, (x, y)) == cells


@CALM
@given(st.lists(REAL, max_size=8), REAL)
def test_hypervolume_never_shrinks_when_a_point_is_added(points, extra):
    reference = (1e6, 1e6)
    assert hypervolume([*points, extra], reference) >= hypervolume(points, reference) * (1 - 1e-12)


@CALM
@given(st.lists(REAL, max_size=10))
def test_cliff_is_a_share(points):
    assert 0 <= largest_cliff(*split(points)) <= 1


def test_cliff_of_plain_top_k():
    assert largest_cliff([100, 75, 50, 25], [0, 0.0106, 0.0395, 0.178]) == pytest.approx((0.178 - 0.0395) / 0.178)
    assert largest_cliff([1, 1, 2], [9, 4, 4]) == 0  # the worse of two points at one cost is no step
    assert largest_cliff([], []) == largest_cliff([1], [1]) == 0


@CALM
@given(st.lists(st.tuples(st.floats(90, 110), st.floats(0, 1)), max_size=8))
def test_distinct_points_are_as_many_as_can_be(points):
    costs, losses = split(points)
    chosen = distinct_points(costs, losses)
    keep = pareto(costs, losses)

    def apart(subset):
        ordered = sorted(costs[i] for i in subset)
        return all(keep[i] for i in subset) and all(b >= a * 1.02 for a, b in pairwise(ordered))

    assert apart(chosen)
    assert not any(apart(s) for s in combinations(range(len(points)), len(chosen) + 1))


def test_distinct_points_drops_duplicates_even_at_cost_zero():
    assert distinct_points([0, 0, 1], [1, 1, 0.5]) == [0, 2]


@pytest.mark.parametrize("costs, losses", [([1], []), ([1.0], [float("nan")]), ([float("inf")], [0.0])])
def test_bad_numbers_are_refused(costs, losses):
    for function in (pareto, largest_cliff, distinct_points):
        with pytest.raises(UsageError):
            function(costs, losses)
