"""Invariants every solver keeps (spec moe-prism 4.6, 12.3)."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import CorruptError, UsageError
from moe_prism.partition import Partition, cost, cost_share, solvers
from moe_prism.partition.base import block_norms, owner_of
from moe_prism.partition.greedy import greedy_owner
from moe_prism.partition.nested import baseline, nested_cost, ranked_mass, rivals, swap_value
from moe_prism.partition.random_ import random_owner
from moe_prism.partition.swaps import apply_swap, block_sums

FAST = {"sa": {"steps": 300}, "alt": {"starts": 2, "shakes": 3}, "nested": {"starts": 2, "shakes": 3}}


def solve(name: str, mass: np.ndarray, n_sub: int, dropped: int, seed: int = 0, **options: object) -> Partition:
    return solvers.get(name)(mass, n_sub, dropped, seed, **{**FAST.get(name, {}), **options})


def price(name: str, mass: np.ndarray, perm: np.ndarray, n_sub: int, dropped: int) -> float:
    """What the solver of that name minimises."""
    return nested_cost(mass, perm, n_sub) if name == "nested" else cost(mass, perm, n_sub, dropped)


def heavy(seed: int, tokens: int = 60, width: int = 24) -> np.ndarray:
    """Heavy-tailed activations over a few shared features."""
    rng = np.random.default_rng(seed)
    features = np.exp(2 * rng.standard_normal((tokens, 5)))
    return (features @ rng.random((5, width)) ** 4 * rng.random((tokens, width))).astype(np.float32)


def planted(n_sub: int = 4, block: int = 16, tokens: int = 400, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Each token lights up one hidden block; neurons are shuffled. Returns mass and the true owner."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(n_sub), block))
    lit = rng.integers(n_sub, size=tokens)
    mass = rng.random((tokens, owner.size)) * np.where(owner[None] == lit[:, None], 1.0, 0.15)
    return mass.astype(np.float32), owner


def rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index of two labelings."""

    def pairs(x: np.ndarray) -> float:
        return float((x * (x - 1) / 2).sum())

    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    rows, columns, both = pairs(table.sum(1)), pairs(table.sum(0)), pairs(table)
    chance = rows * columns / pairs(np.array([a.size]))
    return (both - chance) / ((rows + columns) / 2 - chance)


@pytest.mark.parametrize("name", solvers.names())
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3), (12, 5)]))
def test_invariants(name: str, seed: int, shape: tuple[int, int]) -> None:
    n_sub, dropped = shape
    mass = heavy(seed)
    found = solve(name, mass, n_sub, dropped, seed)
    assert found.perm.dtype == np.int32
    assert np.array_equal(np.sort(found.perm), np.arange(24))
    assert found.cost == price(name, mass, found.perm, n_sub, dropped)
    assert np.array_equal(found.perm, solve(name, mass, n_sub, dropped, seed).perm)
    if name in ("alt", "nested", "sa"):
        start = price(name, mass, np.argsort(greedy_owner(mass, n_sub), kind="stable"), n_sub, dropped)
        slack = 1e-6 * float(mass.sum())
        assert found.cost <= start + slack
        costs = [c for _, c in found.trace]
        assert costs[0] == pytest.approx(start, abs=slack)
        assert all(late <= early + slack for early, late in pairwise(costs))


def test_cost_is_the_sum_of_the_smallest_norms() -> None:
    mass = np.array([[1, 2, 3, 4], [5, 0, 0, 1]], np.float32)
    assert cost(mass, np.array([0, 1, 2, 3]), 2, 1) == 3 + 1
    assert cost_share(mass, np.array([0, 1, 2, 3]), 2, 1) == 4 / 16
    assert cost(mass, np.array([0, 2, 1, 3]), 4, 3) == 6 + 1
    assert cost_share(np.zeros((2, 4), np.float32), np.arange(4), 2, 1) == 0


@pytest.mark.parametrize("name", ["alt", "nested", "sa"])
def test_planted_partition_is_recovered(name: str) -> None:
    mass, truth = planted()
    found = solve(name, mass, 4, 3, steps=20_000) if name == "sa" else solve(name, mass, 4, 3)
    assert rand_index(truth, owner_of(found.perm, 4)) >= 0.95


@pytest.mark.parametrize("name", ["alt", "nested"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(2, 1), (3, 1), (3, 2)]))
def test_the_optimum_of_tiny_cases_is_found(name: str, seed: int, shape: tuple[int, int]) -> None:
    n_sub, dropped = shape
    mass = heavy(seed, tokens=9, width=6)
    found = solve(name, mass, n_sub, dropped, starts=16, shakes=30)
    best = min(price(name, mass, perm, n_sub, dropped) for perm in partitions(6, n_sub))
    assert found.cost <= best + 1e-6 * float(mass.sum())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n_sub=st.sampled_from([2, 3, 4, 6]))
def test_a_nested_swap_is_priced_exactly(seed: int, n_sub: int) -> None:
    rng = np.random.default_rng(seed)
    mass = heavy(seed)
    owner = random_owner(24, n_sub, rng)
    mass_t = np.ascontiguousarray(mass.T)
    norms = block_sums(mass_t, owner, n_sub)
    before, (g, h) = ranked_mass(norms), rng.choice(n_sub, 2, replace=False)
    u = np.empty((n_sub - 1, len(mass)), np.float32)
    rivals(norms, g, h, u)
    out, into = np.flatnonzero(owner == g)[0], np.flatnonzero(owner == h)[0]
    gain = swap_value(norms[g], norms[h], u, mass_t[out], mass_t[into], np.empty(len(mass), np.float32))
    gain -= baseline(norms[g], norms[h], u)
    apply_swap(mass_t, owner, norms, out, into)
    assert gain == pytest.approx(ranked_mass(norms) - before, abs=1e-5 * before)


def partitions(width: int, n_sub: int) -> list[np.ndarray]:
    """Every way to cut range(width) into equal blocks."""
    size = width // n_sub

    def blocks(left: tuple[int, ...]) -> list[tuple[int, ...]]:
        if not left:
            return [()]
        found = []
        for rest in combinations(left[1:], size - 1):
            block = (left[0], *rest)
            found += [block + tail for tail in blocks(tuple(c for c in left if c not in block))]
        return found

    return [np.array(perm) for perm in blocks(tuple(range(width)))]


def test_degenerate_inputs_are_solved() -> None:
    for name in solvers.names():
        for mass in (np.zeros((3, 8), np.float32), np.ones((1, 8), np.float32), heavy(1, tokens=1, width=8)):
            assert sorted(solve(name, mass, 8, 7).perm) == list(range(8))
            assert sorted(solve(name, mass, 2, 1).perm) == list(range(8))


@pytest.mark.parametrize("name", solvers.names())
def test_bad_input_is_refused(name: str) -> None:
    good = heavy(0)
    for n_sub, dropped in ((5, 1), (1, 0), (0, 1), (-2, 1), (4, 0), (4, 4)):
        with pytest.raises(UsageError):
            solve(name, good, n_sub, dropped)
    for shape in ((0, 24), (24,), (5, 0)):
        with pytest.raises(UsageError):
            solve(name, np.zeros(shape, np.float32), 4, 3)
    for value in (np.nan, np.inf, -1.0):
        bad = good.copy()
        bad[3, 5] = value
        with pytest.raises(CorruptError):
            solve(name, bad, 4, 3)


def test_bad_options_are_refused() -> None:
    with pytest.raises(UsageError):
        solve("alt", heavy(0), 4, 3, starts=0)
    with pytest.raises(UsageError):
        solve("nested", heavy(0), 4, 3, shakes=-1)
    with pytest.raises(UsageError):
        solve("sa", heavy(0), 4, 3, steps=0)
    with pytest.raises(UsageError):
        solvers.get("annealing")


def test_other_dtypes_and_orders_give_the_same_result() -> None:
    mass = heavy(7)
    want = solve("alt", mass, 4, 3)
    assert np.array_equal(solve("alt", mass.astype(np.float64), 4, 3).perm, want.perm)
    assert np.array_equal(solve("alt", np.asfortranarray(mass), 4, 3).perm, want.perm)


def test_block_norms_follow_the_permutation() -> None:
    mass = heavy(2, tokens=4, width=6)
    norms = block_norms(mass, np.array([5, 0, 1, 2, 3, 4]), 3)
    assert np.allclose(norms[:, 0], mass[:, 5] + mass[:, 0])
    assert np.allclose(norms.sum(1), mass.sum(1))
