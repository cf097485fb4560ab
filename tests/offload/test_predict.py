"""Predictors: exact where they must be, in the published order on held-out text of prism-nano."""

from __future__ import annotations

import numpy as np
import pytest

from moe_prism.errors import UsageError
from moe_prism.jobs.trace import TraceOptions, record_trace
from moe_prism.offload import Prefetch, cache_policies, predictors, replay
from moe_prism.offload.predict import recall
from moe_prism.offload.predict.base import chosen, history
from moe_prism.offload.predict.reuse import ReusePredictor
from moe_prism.offload.replay import ReplayOptions, groups

from .common import make, next_layer, sticky, uniform


@pytest.fixture(scope="module")
def nano():
    trace = record_trace("nano", None, TraceOptions(tokens=8192, inputs=True))
    return trace.part("calibration").decode(), trace.part("evaluation").decode()


@pytest.fixture(scope="module")
def fitted(nano):
    return {name: predictors.get(name).fit(nano[0], nano[0].space) for name in predictors.names()}


@pytest.fixture(scope="module")
def scores(nano, fitted):
    return {name: predictor.scores(nano[1]) for name, predictor in fitted.items()}


def test_order_on_held_out_text(nano, scores):
    found = {name: recall(each, nano[1], nano[1].k, 1) for name, each in scores.items()}
    assert found["gate"] > found["dictionary"] + 0.05
    assert found["dictionary"] > found["frequency"] + 0.05
    assert found["learned-gate"] > found["gate"]
    assert found["path"] > found["token"] > found["frequency"]


def test_widening_never_loses(nano, scores):
    for name, each in scores.items():
        recalls = [recall(each, nano[1], width, 1) for width in range(0, 33, 4)]
        assert recalls == sorted(recalls), name
        assert recalls[0] == 0 and recalls[-1] == 1


@pytest.mark.slow
def test_reuse_hints_beat_counts_on_held_out_text(nano):
    fitting, rows = nano
    policy = cache_policies.get("reuse")
    hints = ReusePredictor.fit(fitting, fitting.space).scores(rows)
    ours = replay(rows, policy, 8, ReplayOptions(hints=hints, settings=policy.fit(fitting, fitting.space, 8)))
    assert ours.hits > replay(rows, cache_policies.get("lfu"), 8).hits > replay(rows, cache_policies.get("lru"), 8).hits


def test_prefetch_by_a_gate_saves_misses(nano, scores):
    rows = nano[1]
    lru = cache_policies.get("lru")
    plain = replay(rows, lru, 8)
    none = replay(rows, lru, 8, ReplayOptions(prefetch=Prefetch(scores["gate"], 0, 1)))
    ahead = replay(rows, lru, 8, ReplayOptions(prefetch=Prefetch(scores["gate"], 4, 1)))
    assert none == plain  # width 0 is loading on demand
    assert ahead.misses < plain.misses
    assert 0 < ahead.prefetch_precision < 1 and 0 < ahead.prefetch_recall < 1


def test_a_perfect_prediction_leaves_no_misses():
    trace = make(uniform(30, 3, 8, 2), experts=8)
    truth = np.stack([chosen(trace, layer) for layer in range(3)], axis=1)
    counts = replay(trace, cache_policies.get("lru"), 4, ReplayOptions(prefetch=Prefetch(truth, 2)))
    assert counts.misses == 0 and counts.prefetch_precision > 0.99


def test_dictionary_learns_a_deterministic_next_layer():
    trace = make(next_layer(300, 4, 6), experts=6)
    found = predictors.get("dictionary").fit(trace, trace.space).scores(trace)
    assert recall(found, trace, 1, 1) == 1.0


def test_dictionary_equals_counting():
    trace = make(uniform(40, 3, 4, 2), experts=4)
    found = predictors.get("dictionary").fit(trace, trace.space).scores(trace)
    used = [chosen(trace, layer).astype(bool) for layer in range(3)]

    def share(prior, given, e):
        return (8 * prior + sum(used[2][t][e] for t in np.flatnonzero(given))) / (8 + given.sum())

    for t in (0, 7):
        for e in range(4):
            expected = 0.0
            for a in trace.expert_ids[t, 0]:
                for b in trace.expert_ids[t, 1]:
                    one = share(used[2][:, e].mean(), used[1][:, b], e)
                    expected += share(one, used[0][:, a] & used[1][:, b], e)
            assert found[t, 2, e] == pytest.approx(expected, rel=1e-4)


def test_token_table_equals_counting():
    token = np.arange(40, dtype=np.int32) % 5
    trace = make(uniform(40, 2, 4, 2), experts=4, token=token)
    found = predictors.get("token").fit(trace, trace.space).scores(trace)
    used = chosen(trace, 1)
    expected = (used[token == 3].sum(0) + 2 * used.mean(0)) / (8 + 2)
    np.testing.assert_allclose(found[3, 1], expected, rtol=1e-5)


def test_gate_is_exact_where_neighbours_are_equal():
    draw = np.random.default_rng(0)
    x, router = draw.normal(size=(50, 16)), draw.normal(size=(8, 16))
    ids = (-(x.astype(np.float16).astype(np.float32) @ router.T)).argsort(-1)[:, :2]
    trace = make(
        np.stack([ids] * 3, axis=1),
        experts=8,
        inputs=np.stack([x] * 3, axis=1).astype(np.float16),
        routers=np.stack([router] * 3).astype(np.float32),
    )
    assert recall(predictors.get("gate").fit(trace, trace.space).scores(trace), trace, 2, 1) == 1.0


def test_gate_needs_inputs():
    trace = make(uniform(10, 2, 8, 2), experts=8)
    with pytest.raises(UsageError, match="inputs"):
        predictors.get("gate").fit(trace, trace.space)


def test_path_is_deterministic_and_leaves_the_global_generator_alone():
    import torch

    trace = make(sticky(40, 2, 6, 2), experts=6, token=np.arange(40, dtype=np.int32) % 7)
    path = predictors.get("path")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    runs = [path.fit(trace, trace.space).scores(trace) for _ in range(2)]
    assert np.array_equal(*runs)
    assert torch.equal(torch.rand(1), expected)


def test_history_stops_at_the_request():
    trace = make(uniform(6, 1, 4, 1), experts=4, request=np.array([0, 0, 0, 1, 1, 1]), token=np.arange(6, dtype=np.int32))
    assert history(trace).tolist()[2:5] == [[1, 0, -1, -1], [-1] * 4, [3, -1, -1, -1]]


def test_prefetch_takes_the_best_of_all_tokens_of_a_step():
    trace = make(uniform(4, 1, 6, 2), experts=6, step=np.zeros(4, np.int32))
    scores = np.zeros((4, 1, 6), np.float32)
    scores[:, 0, 4], scores[2, 0, 1] = 1, 3
    group = next(iter(groups(trace, trace.space)))
    assert Prefetch(scores, 2).keys(group, trace.space) == [4, 1]
