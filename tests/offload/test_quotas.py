"""Quotas against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prism.errors import UsageError
from moe_prism.offload import cache_policies, replay
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
