"""Orders that no store uses, where they are measured: load order and batches of requests against brute force, known tokens as their sum."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from moe_prism.errors import UsageError
from moe_prism.jobs.trace import TraceOptions, record_trace
from moe_prism.offload import cache_policies, predictors, replay
from moe_prism.offload.replay import ReplayOptions
from tests.offload.common import make, uniform


@pytest.fixture
def grouping(script):
    return script("group_requests")


@pytest.fixture
def order(script):
    return script("load_order")


@pytest.fixture
def known(script):
    return script("known_tokens")


@pytest.fixture(scope="module")
def nano():
    trace = record_trace("nano", None, TraceOptions(tokens=8192, inputs=True))
    fitting = trace.part("calibration").decode()
    return predictors.get("path").fit(fitting, fitting.space), trace.part("evaluation").decode()


def expert_sets(seed: int, count: int, experts: int = 6, each: int = 1) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.permutation(experts)[:each].tolist() for _ in range(count)]


@pytest.mark.parametrize("limit", range(1, 7))
@pytest.mark.parametrize("each", range(1, 4))
def test_batches_hold_everyone_once_and_nobody_waits_forever(grouping, limit, each):
    for seed in range(5):
        wanted = expert_sets(seed, 40, each=each)
        batches = grouping.fill_batches(wanted, limit, window=12, patience=4)
        assert sorted(r for b in batches for r in b) == list(range(40))
        assert all(1 <= len(b) <= limit for b in batches)
        # at most `window` wait, each at the head of the queue after 4 batches
        assert grouping.longest_wait(batches) <= 12 + 4


def test_batching_lowers_distinct_experts(grouping):
    for seed in range(5):
        wanted = expert_sets(seed, 200, each=2)
        arrival = [list(range(i, i + 8)) for i in range(0, 200, 8)]
        assert grouping.distinct(grouping.fill_batches(wanted, 8), wanted) < grouping.distinct(arrival, wanted)


def test_single_expert_requests_fill_from_the_longest_queue(grouping):
    wanted = [[0], [1], [1], [2], [1], [0]]
    assert grouping.fill_batches(wanted, 3) == [[1, 2, 4], [0, 5, 3]]


def test_few_single_expert_requests_are_batched_as_well_as_can_be(grouping):
    for seed in range(20):
        wanted = expert_sets(seed, 6, experts=3)
        ours = grouping.distinct(grouping.fill_batches(wanted, 3, patience=99), wanted)
        best = min(grouping.distinct([order[:3], order[3:]], wanted) for order in permutations(range(6)))
        assert ours <= best + 0.5  # greedy: at most one expert more over the two batches


def test_batching_refuses_nonsense(grouping):
    for bad in ({"limit": 0}, {"limit": 9, "window": 4}, {"limit": 1, "patience": 0}):
        with pytest.raises(UsageError):
            grouping.fill_batches([[0]], **bad)


def legal(jobs):
    """All orders in which the planes of an expert ascend."""
    for each in permutations(jobs):
        last = {}
        if all((last.get(e, -1) == p - 1, last.update({e: p}))[0] for e, p in each):
            yield list(each)


@pytest.mark.parametrize("planes", [1, 2])
def test_hottest_first_is_near_the_optimum(order, planes):
    """One plane per expert: exactly it (Johnson's rule). Several: close, where number order is several percent off."""
    gaps, naive = [], []
    for seed in range(30):
        draw = np.random.default_rng(seed)
        uses = np.sort(draw.integers(1, 30, size=(5 - planes, planes)), axis=1)[:, ::-1].tolist()
        load, compute = draw.uniform(1, 3, planes).tolist(), draw.uniform(0.05, 0.2, planes).tolist()
        jobs = order.by_number(uses)
        best = min(order.makespan(each, uses, load, compute) for each in legal(jobs))
        ours, plain = (order.makespan(each(uses), uses, load, compute) for each in (order.hottest_first, order.by_number))
        assert best >= max(sum(load[p] for _, p in jobs), sum(uses[e][p] * compute[p] for e, p in jobs) + load[0]) - 1e-9
        gaps.append(ours / best - 1)
        naive.append(plain / best - 1)
    assert np.mean(gaps) < 0.005 < 0.02 < np.mean(naive)
    assert max(gaps) < (1e-9 if planes == 1 else 0.1)


def test_planes_stay_in_order_and_unused_ones_are_not_loaded(order):
    assert order.hottest_first([[5, 4, 0], [9, 1, 1]]) == [(1, 0), (0, 0), (0, 1), (1, 1), (1, 2)]
    with pytest.raises(UsageError, match="out of order"):
        order.makespan([(0, 1)], [[1, 1]], [1, 1], [1, 1])
    assert order.hottest_first([]) == []


def test_rows_of_the_benchmark_are_bounded_by_loading_and_by_waiting(script):
    """At no price of work all orders take what loading takes; grouped steps of a half read no less than one step of all."""
    orders = script("orders")
    trace = make(uniform(256, 2, 8, 2), experts=8, request=np.repeat(np.arange(16), 16))
    for row in orders.loads(trace, 0.5, [1, 4], [0.0, 0.5]):
        assert 1 <= row["hottest"] <= row["await"] and row["misses_per_layer"] > 0
        if row["price"] == 0:
            assert row["await"] == row["number"] == row["hottest"] == 1
    (row,) = orders.requests(trace)
    assert row["one step"] <= row["two steps, grouped"] and row["grouped"] <= row["arrival"]


@pytest.mark.slow
def test_known_ids_are_worth_more_than_the_past(known, nano):
    """The path predictor on the next ids against all that is known without them; the true routing is worth more still."""
    path, rows, policy = nano[0], nano[1].rows(slice(768)), cache_policies.get("reuse")
    mix = {"coefficients": known.coefficients(rows.space)}
    hints = known.drafted(rows, path, 4), known.oracle(rows, 4)
    hits = [replay(rows, policy, 8, ReplayOptions(hints=each, settings=mix)).hits for each in hints]
    assert (
        replay(rows, cache_policies.get("lfu"), 8).hits < hits[0] < hits[1] <= replay(rows, cache_policies.get("belady"), 8).hits
    )


def test_drafted_equals_its_sum(known, nano):
    path, rows = nano[0], nano[1].rows(slice(185, 200))  # the last rows of one request and the first of another
    p = 1 / (1 + np.exp(-path.scores(rows).astype(np.float64)))
    found = known.drafted(rows, path, 2)
    for t in range(15):
        later = [p[t + j] if t + j < 15 and rows.request[t + j] == rows.request[t] else p.mean(0) for j in (1, 2)]
        np.testing.assert_allclose(found[t], 0.7 * later[0] + 0.49 * later[1] * (1 - later[0]), rtol=1e-4)
