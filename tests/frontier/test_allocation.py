"""The knapsack over choices: against brute force, HiGHS, and each other."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from moe_prism.errors import UsageError
from moe_prism.frontier import exact, greedy_path, hull_greedy, lp_bound

CALM = settings(deadline=None, max_examples=60)
CHOICE = st.tuples(st.integers(0, 6), st.integers(0, 30).map(float))  # small numbers: ties are common
CURVES = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=4)


def least(curves):
    return sum(min(c for c, _ in curve) for curve in curves)


def brute_force(curves, budget):
    return min(sum(v for _, v in row) for row in product(*curves) if sum(c for c, _ in row) <= budget)


def check(curves, budget, found):
    """An allocation says what it costs and stays within the budget."""
    assert found.cost == pytest.approx(sum(curve[c][0] for curve, c in zip(curves, found.choices, strict=True)))
    assert found.loss == pytest.approx(sum(curve[c][1] for curve, c in zip(curves, found.choices, strict=True)), abs=1e-9)
    assert found.cost <= budget + 1e-9


def relaxed(curves, budget, integrality):
    """(loss) by HiGHS, choices whole (1) or mixed (0)."""
    cost, loss = (np.array([pair[i] for curve in curves for pair in curve]) for i in (0, 1))
    one = np.zeros((len(curves), len(cost)))
    edges = np.cumsum([0, *map(len, curves)])
    for i, (a, b) in enumerate(pairwise(edges)):
        one[i, a:b] = 1
    rows = [LinearConstraint(one, 1, 1), LinearConstraint(cost[None], ub=budget)]
    return milp(loss, constraints=rows, bounds=Bounds(0, 1), integrality=np.full(len(cost), integrality)).fun


@CALM
@given(CURVES, st.integers(0, 12))
def test_bound_exact_and_greedy_stand_in_order(curves, extra):
    budget = least(curves) + extra
    greedy, best = hull_greedy(curves, budget), exact(curves, budget)
    check(curves, budget, greedy)
    check(curves, budget, best)
    assert best.loss == pytest.approx(brute_force(curves, budget))
    assert lp_bound(curves, budget) <= best.loss + 1e-9 <= greedy.loss + 2e-9
    assert greedy.loss <= greedy_path(curves).at(budget).loss + 1e-9


@CALM
@given(CURVES, st.integers(0, 12))
def test_bound_and_exact_are_those_of_highs(curves, extra):
    budget = least(curves) + extra
    assert lp_bound(curves, budget) == pytest.approx(relaxed(curves, budget, 0), abs=1e-6)
    assert exact(curves, budget).loss == pytest.approx(relaxed(curves, budget, 1), abs=1e-6)


@CALM
@given(CURVES)
def test_the_path_is_monotone_and_exact_at_every_step(curves):
    path = greedy_path(curves)
    assert (np.diff(path.costs) > 0).all() and (np.diff(path.losses) < 0).all()
    slopes = np.diff(path.losses) / np.diff(path.costs)
    assert (np.diff(slopes) > -1e-9).all()
    for cost, loss in zip(path.costs, path.losses, strict=True):
        assert hull_greedy(curves, cost).loss == pytest.approx(loss)
        assert loss == pytest.approx(exact(curves, int(cost)).loss)
    assert path.at(1e9).loss == pytest.approx(sum(min(v for _, v in curve) for curve in curves))


@CALM
@given(CURVES)
def test_more_budget_never_loses_more(curves):
    budgets = range(least(curves), least(curves) + 25)
    path = greedy_path(curves)
    for solve in (path.bound, lambda b: path.at(b).loss, lambda b: exact(curves, b).loss):
        found = [solve(b) for b in budgets]
        assert all(later <= earlier + 1e-9 for earlier, later in pairwise(found))


@CALM
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 24))
def test_unit_steps_of_falling_gain_are_solved_exactly(gains, extra):
    """Convex curves on a grid of whole costs: greedy = bound = exact at every whole budget, and no choice ever goes back."""
    curves = [[(1 + i, -float(s)) for i, s in enumerate([0, *np.cumsum(sorted(g, reverse=True))])] for g in gains]
    budget = len(curves) + extra
    path = greedy_path(curves)
    greedy, more = path.at(budget), path.at(budget + 1)
    assert greedy.loss == pytest.approx(exact(curves, budget).loss, abs=1e-9)
    assert greedy.loss == pytest.approx(lp_bound(curves, budget), abs=1e-9)
    assert all(a <= b for a, b in zip(greedy.choices, more.choices, strict=True))


def test_arrays_and_lists_are_the_same_curves():
    rng = np.random.default_rng(0)
    table = np.stack([rng.integers(0, 9, (40, 5)).astype(float), rng.random((40, 5))], axis=2)
    lists = [[tuple(pair) for pair in row] for row in table.tolist()]
    budget = float(least(lists) + 60)
    assert hull_greedy(table, budget) == hull_greedy(lists, budget)
    assert exact(table, budget) == exact(lists, budget)


def test_a_large_one_is_certified_by_its_bound():
    rng = np.random.default_rng(1)
    gains = rng.exponential(size=(256, 3))
    losses = np.cumsum(gains[:, ::-1], axis=1)[:, ::-1]
    table = np.stack([np.broadcast_to(np.arange(4.0), (256, 4)), np.c_[losses, np.zeros(256)]], axis=2)
    greedy, bound = hull_greedy(table, 384), lp_bound(table, 384)
    assert bound - 1e-9 <= greedy.loss <= bound + gains.max()
    assert linprog_bound(table, 384) == pytest.approx(bound)


def linprog_bound(table, budget):
    items, choices = table.shape[:2]
    one = np.kron(np.eye(items), np.ones(choices))
    return linprog(table[..., 1].ravel(), A_ub=table[..., 0].reshape(1, -1), b_ub=[budget], A_eq=one, b_eq=np.ones(items)).fun


@pytest.mark.parametrize("solve", [hull_greedy, lp_bound, exact])
def test_what_cannot_be_solved_is_refused(solve):
    with pytest.raises(UsageError, match="less than the cheapest"):
        solve([[(2, 1.0)], [(3, 1.0)]], 4)
    with pytest.raises(UsageError, match="no choices"):
        solve([[(2, 1.0)], []], 4)
    for bad in ([[(1, float("nan"))]], np.full((1, 1, 2), np.inf)):
        with pytest.raises(UsageError, match="not a finite"):
            solve(bad, 4)
    with pytest.raises(UsageError, match="shape"):
        solve(np.zeros((2, 2)), 4)


def test_exact_wants_whole_costs():
    with pytest.raises(UsageError, match="whole number"):
        exact([[(0.5, 1.0)]], 1)


def test_no_items_cost_nothing():
    assert hull_greedy([], 0) == exact([], 0)
    assert lp_bound([], 0) == 0
