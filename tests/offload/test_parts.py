"""Quotas, look-ahead batching and load order, each against brute force."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import UsageError
from moe_prism.offload import cache_policies, replay
from moe_prism.offload.io_order import by_number, hottest_first, makespan
from moe_prism.offload.lookahead import distinct, fill_batches, longest_wait
from moe_prism.offload.quotas import miss_curves, quotas

from .common import make, sticky, uniform


@given(st.integers(0, 1000), st.integers(4, 14))
def test_quotas_equal_brute_force(seed, total):
    curves = np.random.default_rng(seed).integers(0, 50, size=(3, 4))
    sizes = [1, 2, 4, 5]
    found = quotas(curves, sizes, total)
    assert sum(found) <= total
    cost = sum(curves[i, sizes.index(s)] for i, s in enumerate(found))
    assert cost == min(
        sum(curves[i, c] for i, c in enumerate(choice))
        for choice in product(range(4), repeat=3)
        if sum(sizes[c] for c in choice) <= total
    )


def test_quotas_need_room():
    with pytest.raises(UsageError, match="too few"):
        quotas(np.zeros((3, 2)), [2, 4], 5)


def test_quotas_go_where_routing_is_uneven():
    ids = np.stack([sticky(200, 1, 8, 2, stay=0.99, seed=1)[:, 0], uniform(200, 1, 8, 2, seed=2)[:, 0]], axis=1)
    trace = make(ids, experts=8)
    lru = cache_policies.get("lru")
    sizes = range(2, 9)
    curves = miss_curves(trace, lru, sizes, trace.space)
    assert curves[0, 2] == replay(make(ids[:, :1], experts=8), lru, 4).misses
    found = quotas(curves, sizes, 8)
    assert replay(trace, lru, found).misses <= replay(trace, lru, 4).misses


def expert_sets(seed: int, count: int, experts: int = 6, each: int = 1) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.permutation(experts)[:each].tolist() for _ in range(count)]


@given(st.integers(0, 500), st.integers(1, 6), st.integers(1, 3))
def test_batches_hold_everyone_once_and_nobody_waits_forever(seed, limit, each):
    wanted = expert_sets(seed, 40, each=each)
    batches = fill_batches(wanted, limit, window=12, patience=4)
    assert sorted(r for b in batches for r in b) == list(range(40))
    assert all(1 <= len(b) <= limit for b in batches)
    # at most `window` wait, each at the head of the queue after 4 batches
    assert longest_wait(batches) <= 12 + 4


def test_batching_lowers_distinct_experts():
    for seed in range(5):
        wanted = expert_sets(seed, 200, each=2)
        arrival = [list(range(i, i + 8)) for i in range(0, 200, 8)]
        assert distinct(fill_batches(wanted, 8), wanted) < distinct(arrival, wanted)


def test_single_expert_requests_fill_from_the_longest_queue():
    wanted = [[0], [1], [1], [2], [1], [0]]
    assert fill_batches(wanted, 3) == [[1, 2, 4], [0, 5, 3]]


@settings(deadline=None)
@given(st.integers(0, 300))
def test_few_single_expert_requests_are_batched_as_well_as_can_be(seed):
    wanted = expert_sets(seed, 6, experts=3)
    ours = distinct(fill_batches(wanted, 3, patience=99), wanted)
    best = min(distinct([order[:3], order[3:]], wanted) for order in permutations(range(6)))
    assert ours <= best + 0.5  # greedy: at most one expert more over the two batches


def test_batching_refuses_nonsense():
    for bad in ({"limit": 0}, {"limit": 9, "window": 4}, {"limit": 1, "patience": 0}):
        with pytest.raises(UsageError):
            fill_batches([[0]], **bad)


def orders(uses):
    jobs = by_number(uses)
    for order in permutations(jobs):
        last = {}
        if all((last.get(e, -1) == p - 1, last.update({e: p}))[0] for e, p in order):
            yield list(order)


@pytest.mark.parametrize("planes", [1, 2])
def test_hottest_first_is_near_the_optimum(planes):
    """One plane per expert: exactly it (Johnson's rule). Several: close, where number order is several percent off."""
    gaps, naive = [], []
    for seed in range(30):
        draw = np.random.default_rng(seed)
        uses = np.sort(draw.integers(1, 30, size=(5 - planes, planes)), axis=1)[:, ::-1].tolist()
        load, compute = draw.uniform(1, 3, planes).tolist(), draw.uniform(0.05, 0.2, planes).tolist()
        best = min(makespan(order, uses, load, compute) for order in orders(uses))
        ours, plain = (makespan(order(uses), uses, load, compute) for order in (hottest_first, by_number))
        jobs = by_number(uses)
        assert best >= max(sum(load[p] for _, p in jobs), sum(uses[e][p] * compute[p] for e, p in jobs) + load[0]) - 1e-9
        gaps.append(ours / best - 1)
        naive.append(plain / best - 1)
    assert np.mean(gaps) < 0.005 < 0.02 < np.mean(naive)
    assert max(gaps) < (1e-9 if planes == 1 else 0.1)


def test_planes_stay_in_order_and_unused_ones_are_not_loaded():
    assert hottest_first([[5, 4, 0], [9, 1, 1]]) == [(1, 0), (0, 0), (0, 1), (1, 1), (1, 2)]
    with pytest.raises(UsageError, match="out of order"):
        makespan([(0, 1)], [[1, 1]], [1, 1], [1, 1])
    assert hottest_first([]) == []
