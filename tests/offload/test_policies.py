"""Every policy against its reference model, all of them against the bound, the bound against brute force."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.offload import KeySpace, Moment, Pool, cache_policies, replay
from moe_prism.offload.replay import ReplayOptions, groups

from . import references
from .common import constant, make, sticky, uniform

REFERENCES = {
    "lru": references.lru,
    "lfu": references.lfu,
    "lfru": references.lfru,
    "edge-moe": references.edge_moe,
    "per-byte": references.per_byte,
    "static": references.static,
    "hobbit": references.hobbit,
    "reuse": references.reuse,
}
SPACE = KeySpace(3, 4)
SETTINGS = {
    "static": {"profile": [references.PROFILE[k % 7] for k in range(len(SPACE))]},
    "hobbit": {"mix": references.MIX, "high": references.HIGH},
}
DEMAND = [n for n in cache_policies.names() if not cache_policies.get(n).needs_future]


def requests(steps: int, seed: int, space: KeySpace = SPACE, most: int = 2):
    """(now, keys, weights) of random groups, layer after layer."""
    draw = np.random.default_rng(seed)
    for clock in range(steps * space.layers):
        layer = clock % space.layers
        skewed = draw.permutation(space.experts)[: draw.integers(1, most + 1)] if draw.random() < 0.5 else [0, 1][:most]
        keys = [space.key(layer, int(e)) for e in skewed]
        yield Moment(clock, clock // space.layers, layer), keys, draw.random(len(keys)).tolist()


def compare(name: str, capacity: int, steps: int, seed: int) -> int:
    """Run pool and reference side by side; every victim must be the least worthy, of equal ones the least recently used."""
    worth = REFERENCES[name]
    policy = cache_policies.get(name)(SPACE, capacity, **SETTINGS.get(name, {}))
    pool, past, order, hits = Pool(capacity, policy), [], [], 0
    for now, keys, weights in requests(steps, seed):
        before = set(pool.resident)
        access = pool.request(keys, now, weights)
        assert set(access.hits) == before & set(keys)
        hits += len(access.hits)
        for key in access.hits:
            past.append((now, key, weights[keys.index(key)]))
            order.remove(key)
            order.append(key)
        for load in access.loads:
            past.append((now, load.key, weights[keys.index(load.key)]))
            for victim in load.victims:
                rest = [k for k in order if k not in keys]
                values = {k: worth(past, k, now, SPACE) for k in rest}
                assert values[victim] <= min(values.values()) + 1e-9
                if name in ("lru", "static", "lfru", "edge-moe"):  # their arithmetic is exact, so ties are ties
                    assert victim == min(rest, key=values.__getitem__)
                order.remove(victim)
            order.append(load.key)
        assert pool.resident == set(order)
    assert hits == pool.counts.hits
    return hits


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("capacity", [2, 4, 7])
def test_equals_reference(name, capacity):
    hits = compare(name, capacity, 60, seed=capacity)
    assert hits > 0 or capacity == 2  # less than a sweep over the layers needs: lru has none


@given(st.lists(st.integers(0, 11), max_size=200), st.integers(1, 6))
def test_arc_is_the_textbooks(keys, capacity):
    pool = Pool(capacity, cache_policies.get("arc")(SPACE, capacity))
    book = references.TextbookARC(capacity)
    for clock, key in enumerate(keys):
        hit = bool(pool.request([key], Moment(clock, clock, 0)).hits)
        assert hit == book.request(key)
        arc = pool.policy
        assert (list(arc.t1), list(arc.t2)) == (book.t1, book.t2)
        assert (list(arc.b1), list(arc.b2)) == (book.b1, book.b2)
        assert arc.target == book.p


@given(st.lists(st.integers(0, 9), max_size=100), st.integers(1, 6))
def test_fifo_is_a_queue(keys, capacity):
    pool, queue = Pool(capacity, cache_policies.get("fifo")(SPACE, capacity)), []
    for clock, key in enumerate(keys):
        hit = bool(pool.request([key], Moment(clock, clock, 0)).hits)
        assert hit == (key in queue)
        queue = queue if hit else [*queue, key][-capacity:]
        assert pool.resident == set(queue)


def best_hits(work: list[tuple[int, ...]], capacity: int) -> int:
    """The most hits of any choice of victims, by looking at all of them."""

    @cache
    def from_here(at: int, resident: frozenset[int]) -> int:
        if at == len(work):
            return 0
        group = frozenset(work[at])
        hits, union = len(group & resident), resident | group
        surplus = len(union) - capacity
        states = [union]
        for _ in range(max(0, surplus)):
            states = list({s - {k} for s in states for k in s - group})
        return hits + max(from_here(at + 1, s) for s in states)

    return from_here(0, frozenset())


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.booleans())
def test_belady_is_the_optimum(seed, capacity, pooled):
    draw = np.random.default_rng(seed)
    layers = 2 if pooled else 1
    ids = np.stack([draw.permutation(4 if pooled else 6)[:2] for _ in range(9 * layers)]).reshape(9, layers, 2)
    trace = make(ids, experts=6)
    work = [tuple(g.keys) for g in groups(trace, trace.space)]
    counts = replay(trace, cache_policies.get("belady"), [capacity, 0][:layers], ReplayOptions(shared=True))
    assert counts.hits == best_hits(work, capacity)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 8), st.booleans(), st.booleans())
def test_nothing_is_above_belady(seed, slots, shared, is_sticky):
    ids = (sticky if is_sticky else uniform)(40, 3, 8, 2, seed=seed)
    trace = make(ids, experts=8)
    bound = replay(trace, cache_policies.get("belady"), slots, ReplayOptions(shared=shared)).hits
    for name in cache_policies.names():
        assert replay(trace, cache_policies.get(name), slots, ReplayOptions(shared=shared, seed=seed)).hits <= bound, name


@pytest.mark.parametrize("name", cache_policies.names())
def test_same_seed_same_counts(name):
    trace = make(sticky(60, 2, 8, 2), experts=8)
    policy = cache_policies.get(name)
    settings_ = policy.fit(trace, trace.space, 4)
    runs = [replay(trace, policy, 4, ReplayOptions(seed=3, settings=settings_)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0].requested == runs[0].hits + runs[0].misses == 60 * 2 * 2


@pytest.mark.parametrize("name", cache_policies.names())
def test_a_cache_of_k_slots_leaves_no_choice(name):
    trace = make(sticky(50, 3, 8, 2), experts=8)
    assert replay(trace, cache_policies.get(name), 2).hits == replay(trace, cache_policies.get("lru"), 2).hits


@pytest.mark.parametrize("name", cache_policies.names())
def test_constant_routing_misses_once(name):
    trace = make(constant(20, 3, 2), experts=8)
    assert replay(trace, cache_policies.get(name), 2).misses == 6


def test_a_sweep_defeats_lru_alone():
    """A shared pool smaller than one token's keys: the cyclic sweep over layers gives lru nothing, EdgeMoE's distance something."""
    trace = make(sticky(200, 6, 8, 2), experts=8)
    hits = {
        n: replay(trace, cache_policies.get(n), 1, ReplayOptions(shared=True)).hit_rate
        for n in ("lru", "lfu", "edge-moe", "belady")
    }
    assert hits["lru"] < 0.02 < hits["lfu"] <= hits["belady"]
    assert hits["lru"] < hits["edge-moe"] <= hits["belady"]


def test_lookahead_reaches_from_lru_to_belady():
    trace = make(sticky(150, 3, 12, 2, seed=2), experts=12)
    belady = cache_policies.get("belady")
    hits = [replay(trace, belady, 4, ReplayOptions(settings={"window": w})).hits for w in (0, 1, 2, 4, 8, 32, 150)]
    assert hits[0] == replay(trace, cache_policies.get("lru"), 4).hits
    assert hits == sorted(hits)
    assert hits[-1] == replay(trace, belady, 4).hits


def test_hobbit_mix_never_loses_to_its_corners_on_its_own_trace():
    trace = make(sticky(80, 3, 8, 2, seed=5), experts=8)
    hobbit = cache_policies.get("hobbit")
    fitted = hobbit.fit(trace, trace.space, 4)
    corners = [{"mix": tuple(float(i == j) for j in range(4)), "high": fitted["high"]} for i in range(4)]
    ours = replay(trace, hobbit, 4, ReplayOptions(settings=fitted)).misses
    assert ours <= min(replay(trace, hobbit, 4, ReplayOptions(settings=c)).misses for c in corners)


def test_per_byte_keeps_what_is_small():
    policy = cache_policies.get("per-byte")(KeySpace(1, 4), 2, size_of=lambda key: 4 if key == 0 else 1)
    pool = Pool(6, policy)
    for clock, key in enumerate([0, 1, 2]):
        pool.request([key], Moment(clock, 0, 0))
    access = pool.request([3], Moment(3, 0, 0))
    assert access.loads == ((3, (0,)),)
