"""Copies that last one iteration of a training, against static placement and EPLB."""

import numpy as np
import pytest

from moe_prism.errors import UsageError
from moe_prism.placement.hecate import TrainingCluster, loads_of, materialised, simulate_training


def drifting(iterations=40, layers=2, experts=16, seed=0):
    """Loads that change slowly: popularity is a random walk."""
    draw = np.random.default_rng(seed)
    walk = np.cumsum(draw.normal(0, 0.15, (iterations, layers, experts)), 0) + draw.normal(0, 0.7, (1, layers, experts))
    shares = np.exp(walk) / np.exp(walk).sum(-1, keepdims=True)
    return np.round(2048 * shares)


def test_a_share_of_nothing_is_static():
    load = drifting()
    still = simulate_training(load, TrainingCluster(devices=4), "static")
    none = simulate_training(load, TrainingCluster(devices=4, share=0.0), "hecate")
    assert np.array_equal(none.straggler, still.straggler) and not none.moved.any() and not still.moved.any()
    by_hand = load.reshape(40, 2, 4, 4).sum(-1).max(-1).sum(-1)
    assert np.array_equal(still.straggler, by_hand)


@pytest.mark.parametrize("share", [0.125, 0.5, 2.0])
def test_bytes_are_those_of_the_formula(share):
    load, cluster = drifting(), TrainingCluster(devices=4, share=share, expert_bytes=1000)
    cost = simulate_training(load, cluster, "hecate")
    home = np.arange(16) // 4
    for i in range(1, len(load)):
        copies = sum(int(materialised(row, home, 4, int(share * 16)).sum()) - 16 for row in load[i - 1])
        assert cost.moved[i] == 2 * copies * 1000  # weights there, gradients back
    whole = 2 * 16 * 1000  # of all experts of both layers, once
    assert cost.moved.max() <= 2 * share * whole and cost.moved[0] == 0


def test_copies_lower_the_largest_load_or_are_not_made():
    load, home = drifting()[0, 0], np.arange(16) // 4
    before = np.inf
    for copies in range(9):
        held = materialised(load, home, 4, copies)
        busiest = float(((load / held.sum(1))[:, None] * held).sum(0).max())
        assert busiest <= before and (held[np.arange(16), home] == 1).all() and held.sum() <= 16 + copies
        before = busiest
    even = materialised(np.ones(16), home, 4, 8)
    assert even.sum() == 16


def test_per_iteration_copies_wait_less_than_static_where_loads_drift_and_move_less_than_eplb():
    load = drifting()
    costs = {
        way: simulate_training(load, TrainingCluster(devices=4, share=0.25, period=10), way)
        for way in ("static", "eplb", "hecate")
    }
    assert costs["hecate"].straggler.mean() < costs["static"].straggler.mean()
    assert costs["hecate"].moved.mean() < costs["eplb"].moved.mean()
    assert all((cost.straggler >= cost.even - 1e-9).all() for cost in costs.values())


def test_a_move_of_eplb_takes_the_state_along():
    load = drifting(iterations=11)
    small, large = (simulate_training(load, TrainingCluster(devices=4, period=10, state=s), "eplb") for s in (0.0, 6.0))
    assert large.moved[10] - small.moved[10] == 6 * (small.moved[10] - _replicas(small)) and small.moved[9] == 0


def _replicas(cost):
    """Bytes of the gradients and weights of replicas: what an iteration without a move takes."""
    load = np.concatenate([drifting(iterations=11), drifting(iterations=11)[-1:]])
    return simulate_training(load, TrainingCluster(devices=4, period=10, state=0.0), "eplb").moved[11]


def test_loads_are_counted_per_iteration():
    ids = np.array([[[0, 1]], [[1, -1]], [[2, 1]], [[0, 0]], [[1, 1]]])
    assert loads_of(ids, 3, 2).tolist() == [[[1, 2, 0]], [[2, 1, 1]]]


def test_a_cluster_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="15 experts"):
        simulate_training(np.ones((2, 1, 15)), TrainingCluster(devices=4), "static")
    with pytest.raises(UsageError, match="share"):
        simulate_training(np.ones((2, 1, 16)), TrainingCluster(devices=4, share=-1.0), "hecate")
