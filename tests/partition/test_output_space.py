"""The output-space refinement against brute force."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.partition import solvers
from moe_prism.partition.base import Partition, perm_of
from moe_prism.partition.output_space import Search, output_error, refine
from moe_prism.partition.random_ import random_owner


def expert(seed: int, tokens: int = 40, width: int = 24, hidden: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Signed heavy-tailed activations [T, f] of a few shared features, and down [d, f]."""
    rng = np.random.default_rng(seed)
    a = np.exp(1.5 * rng.standard_normal((tokens, 4))) @ rng.random((4, width)) ** 4 * rng.standard_normal((tokens, width))
    return a.astype(np.float32), rng.standard_normal((hidden, width)).astype(np.float32)


def by_hand(a: np.ndarray, down: np.ndarray, perm: np.ndarray, n_sub: int, dropped: int) -> float:
    """The cost token by token."""
    total = 0.0
    for row in a.astype(float):
        outputs = sorted((down[:, block].astype(float) @ row[block] for block in np.split(perm, n_sub)), key=np.linalg.norm)
        total += float(np.square(sum(outputs[:dropped])).sum())
    return total


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(2, 1), (3, 2), (4, 2), (4, 3)]))
def test_it_never_loses_and_says_what_it_reached(seed: int, shape: tuple[int, int]) -> None:
    n_sub, dropped = shape
    a, down = expert(seed)
    start = Partition(perm_of(random_owner(24, n_sub, np.random.default_rng(seed)), n_sub), 0.0)
    found = refine(start, a, down, n_sub, dropped)
    errors = [error for _, error in found.trace]
    assert sorted(found.perm) == list(range(24))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(by_hand(a, down, start.perm, n_sub, dropped), rel=1e-4)
    assert errors[-1] == pytest.approx(by_hand(a, down, found.perm, n_sub, dropped), rel=1e-4)
    assert output_error(a, down, found.perm, n_sub, dropped) == pytest.approx(errors[-1], rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_every_swap_is_priced_exactly_while_the_choice_of_blocks_stays(seed: int) -> None:
    a, down = expert(seed)
    state = Search(a, down, random_owner(24, 4, np.random.default_rng(seed)), 4, 2)

    def error(owner: np.ndarray) -> float:
        kept_out = state.out[owner].T  # [T, f]: is the neuron's block left out?
        return float((((a * kept_out).astype(float) @ down.T.astype(float)) ** 2).sum())

    mine, other, change = state.prices(1, 3)
    for i, j in [(0, 0), (2, 5), (5, 1)]:
        owner = state.owner.copy()
        owner[mine[i]], owner[other[j]] = 3, 1
        assert change[i, j] == pytest.approx(error(owner) - error(state.owner), abs=1e-4 * error(state.owner))


@pytest.mark.parametrize("seed", range(6))
def test_a_few_starts_find_the_optimum_of_tiny_cases(seed: int) -> None:
    a, down = expert(seed, tokens=9, width=8, hidden=3)
    halves = [np.array([*half, *(c for c in range(8) if c not in half)]) for half in combinations(range(8), 4)]
    best = min(by_hand(a, down, perm, 2, 1) for perm in halves)
    rng = np.random.default_rng(seed)
    starts = [Partition(perm_of(random_owner(8, 2, rng), 2), 0.0) for _ in range(8)]
    found = min(output_error(a, down, refine(start, a, down, 2, 1).perm, 2, 1) for start in starts)
    assert found == pytest.approx(best, rel=1e-4)


def test_cancelling_neurons_are_kept_together() -> None:
    """Neurons 2i and 2i+1 cancel in the output: a block of such pairs costs nothing, which no norm of activations can see."""
    rng = np.random.default_rng(0)
    half, columns = rng.random((50, 4)).astype(np.float32), rng.standard_normal((3, 4)).astype(np.float32)
    a, down = np.repeat(half, 2, axis=1), np.repeat(columns, 2, axis=1) * np.tile([1, -1], 4).astype(np.float32)
    start = Partition(np.array([0, 2, 4, 6, 1, 3, 5, 7], np.int32), 0.0)
    assert output_error(a, down, start.perm, 2, 1) > 1
    assert output_error(a, down, refine(start, a, down, 2, 1).perm, 2, 1) < 1e-6


def test_the_gain_over_the_solver_it_starts_from_is_real() -> None:
    a, down = expert(3, tokens=300, width=32, hidden=16)
    start = solvers.get("alt")(np.abs(a) * np.linalg.norm(down, axis=0), 4, 3, 0)
    after = refine(start, a, down, 4, 3)
    assert output_error(a, down, after.perm, 4, 3) < 0.97 * output_error(a, down, start.perm, 4, 3)
