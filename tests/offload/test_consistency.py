"""SRP and SCH against brute force, and what the paper says about them on traces whose answer is known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import UsageError
from moe_prism.offload import cache_policies, load_trace, replay
from moe_prism.offload.consistency import routing_report, sch, srp, windowed
from moe_prism.offload.predict.base import chosen

from .common import constant, make, sticky, uniform


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=4, max_size=9), st.integers(1, 4))
def test_srp_equals_all_segment_choices(used, m):
    """One expert: no choice of segments to be active in has a better F1 than the best threshold."""
    trace = make(np.where(used, 0, -1)[:, None, None], experts=2)
    f = windowed(chosen(trace, 0), m)[:, 0]
    total, best = f.sum(), 0.0
    for choice in product([0, 1], repeat=len(f)):
        matched, predicted = (f * choice).sum(), m * sum(choice)
        best = max(best, 2 * matched / (predicted + total) if total else 0.0)
    assert srp(trace, m).score == pytest.approx(best)


def test_windows_are_sums():
    used = np.random.default_rng(0).random((10, 3)) < 0.4
    assert windowed(used, 4).tolist() == [used[i : i + 4].sum(0).tolist() for i in range(7)]
    assert windowed(used, 11).shape == (0, 3)
    with pytest.raises(UsageError):
        windowed(used, 0)


def test_constant_routing_is_perfect():
    trace = make(constant(40, 2, 2), experts=8)
    assert srp(trace, 16).score == 1.0 and srp(trace, 16).size == 1.0
    assert sch(trace, 4, rho=1) == pytest.approx(1 - 2 * 2 / (40 * 2 * 2))


def test_segments_do_not_cross_requests():
    ids = np.concatenate([constant(8, 1, 1), constant(8, 1, 1) + 1])
    assert srp(make(ids, experts=2, request=np.repeat([0, 1], 8)), 8).score == 1.0
    assert srp(make(ids, experts=2), 8).score < 1.0


def test_srp_does_not_care_for_names():
    ids = sticky(100, 2, 8, 2, seed=4)
    relabelled = np.random.default_rng(1).permutation(8)[ids]
    assert srp(make(ids, experts=8), 8) == srp(make(relabelled, experts=8), 8)


def test_uniform_routing_has_the_analytic_value():
    """f is binomial(m, k/E): the best threshold's F1 in expectation."""
    m, share = 8, 2 / 8
    trace = make(uniform(6000, 1, 8, 2, seed=1), experts=8)
    binomial = np.array([1.0])
    for _ in range(m):
        binomial = np.convolve(binomial, [1 - share, share])
    f = np.arange(m + 1)
    best = max(2 * (f * binomial)[a:].sum() / (m * binomial[a:].sum() + m * share) for a in range(1, m + 1))
    assert srp(trace, m).score == pytest.approx(best, abs=0.01)


def test_longer_segments_are_harder():
    trace = make(sticky(400, 2, 8, 2, stay=0.95, seed=2), experts=8)
    scores = [srp(trace, m).score for m in (1, 4, 16, 64)]
    assert scores[0] == 1.0 and scores == sorted(scores, reverse=True)


def test_steadier_models_score_higher_and_hit_more():
    """The paper: SRP and SCH foretell the hit rates of lru and lfu over models."""
    found = []
    for stay in (0.0, 0.7, 0.95):
        trace = make(sticky(500, 2, 12, 2, stay=stay, seed=3), experts=12)
        rates = [replay(trace, cache_policies.get(n), 4).hit_rate for n in ("lru", "lfu")]
        found.append([srp(trace, 16).score, sch(trace, 16), *rates])
    for column in zip(*found, strict=True):
        assert list(column) == sorted(column)


def test_published_order_on_sticky_traces():
    trace = make(sticky(500, 3, 16, 2, stay=0.98, seed=6), experts=16)
    for rho in (2, 3):
        slots = rho * 2
        hits = {n: replay(trace, cache_policies.get(n), slots).hits for n in ("belady", "sch", "lru")}
        assert hits["belady"] >= hits["sch"] >= hits["lru"]


def test_report_of_the_shipped_trace():
    trace = load_trace("nano")
    report = routing_report(trace.rows(trace.request < 3))
    rates = report["hit_rates"]
    assert [row["slots"] for row in rates] == [4, 8, 12]
    assert len({round(rates[0][n], 9) for n in ("lru", "lfu", "belady")}) == 1  # k slots leave no choice
    for row in rates:
        assert row["belady"] >= row["sch(16)"] and row["belady"] >= row["lfu"]
