"""The cache itself: random steps of everything it can be asked, with its laws checked after each."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moe_prism.errors import UsageError
from moe_prism.offload import KeySpace, LayerPools, Moment, Pool, cache_policies

SPACE = KeySpace(3, 6)
STEPS = 100_000


class Driver:
    """Any order of calls on one pool; `check` holds its laws."""

    def __init__(self, name: str, capacity: int, sizes: bool) -> None:
        self.size_of = (lambda key: 1 + key % 3) if sizes else (lambda key: 1)
        self.pool = Pool(capacity, cache_policies.get(name)(SPACE, capacity, size_of=self.size_of, seed=1))
        self.clock, self.pins, self.drops = 0, Counter(), 0
        self.pool.foresee({key: range(key, 1000, 7) for key in range(len(SPACE))})

    def now(self, layer: int) -> Moment:
        self.clock += 1
        return self.moment(layer)

    def moment(self, layer: int) -> Moment:
        return Moment(self.clock, self.clock // SPACE.layers, layer)

    def request(self, layer: int, experts: list[int]) -> None:
        keys = [SPACE.key(layer, e) for e in experts]
        chunks = self.pool.chunks(keys, layer)
        assert sorted(k for c in chunks for k in c) == sorted(keys)
        for chunk in chunks:
            before, now = set(self.pool.resident), self.now(layer)
            access = self.pool.request(chunk, now, [0.5] * len(chunk))
            victims = [v for load in access.loads for v in load.victims]
            assert set(access.hits) == before & set(chunk)
            assert sorted([*access.hits, *(load.key for load in access.loads), *access.bypassed]) == sorted(chunk)
            assert len(set(victims)) == len(victims)
            assert not set(victims) & {*chunk, *self.pins}
            assert self.pool.resident == before - set(victims) | {load.key for load in access.loads}

    def prefetch(self, layer: int, experts: list[int], expected: bool) -> None:
        keys = [SPACE.key(layer, e) for e in experts]
        if expected:
            self.pool.expect(layer, keys)
        safe = {k for each in self.pool._expected.values() for k in each} | set(self.pins) | set(keys)
        access = self.pool.prefetch(keys, self.now(layer))
        assert not {v for load in access.loads for v in load.victims} & safe

    def pin(self, key: int) -> None:
        self.pool.pin([key])
        self.pins[key] += 1

    def unpin(self, key: int) -> None:
        if self.pins[key]:
            self.pool.unpin([key])
            self.pins -= Counter([key])

    def drop(self, key: int) -> None:
        if key in self.pool.resident:
            self.pool.drop(key, self.now(0))

    def check(self) -> None:
        pool, counts = self.pool, self.pool.counts
        assert counts.requested == counts.hits + counts.misses
        assert counts.loads + counts.prefetched - counts.evictions == len(pool) == len(pool.resident)
        assert counts.loads <= counts.misses
        assert counts.prefetch_used + counts.prefetch_wasted + len(pool._ahead) == counts.prefetched
        assert sum(map(self.size_of, pool.resident)) == pool.capacity - pool.room <= pool.capacity
        assert counts.requested_bytes == counts.hit_bytes + counts.missed_bytes
        assert self.given_up() == pool.resident

    def given_up(self) -> set[int]:
        """The keys that the policy knows, by its contract alone: it is asked for victims until every key is blocked."""
        policy, blocked = copy.deepcopy(self.pool.policy), set()
        for _ in self.pool.resident:
            victim = policy.victim(blocked, self.moment(0))
            assert victim not in blocked
            blocked.add(victim)
        return blocked


def machine(name: str, sizes: bool):
    experts = st.lists(st.integers(0, 5), unique=True, max_size=6)
    keys = st.integers(0, len(SPACE) - 1)
    layers = st.integers(0, 2)

    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.driver = Driver(name, 7, sizes)

        @rule(layer=layers, experts=experts)
        def request(self, layer, experts):
            self.driver.request(layer, experts)

        @rule(layer=layers, experts=experts, expected=st.booleans())
        def prefetch(self, layer, experts, expected):
            self.driver.prefetch(layer, experts, expected)

        @precondition(lambda self: sum(self.driver.pins.values()) < 3)
        @rule(key=keys)
        def pin(self, key):
            self.driver.pin(key)

        @rule(key=keys)
        def unpin(self, key):
            self.driver.unpin(key)

        @rule(key=keys)
        def drop(self, key):
            self.driver.drop(key)

        @rule(layer=layers, scores=st.lists(st.floats(0, 1), min_size=6, max_size=6))
        def hint(self, layer, scores):
            self.driver.pool.hint(layer, scores, self.driver.now(layer))

        @rule()
        def new_sequence(self):
            self.driver.pool.new_sequence()

        @invariant()
        def laws(self):
            self.driver.check()

    return Machine


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("name", cache_policies.names())
def test_state_machine(name, sizes):
    case = machine(name, sizes).TestCase
    case.settings = settings(max_examples=4, stateful_step_count=30, deadline=None)
    case().runTest()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", cache_policies.names())
def test_many_random_steps(name):
    draw = np.random.default_rng(7)
    driver = Driver(name, 7, sizes=True)
    for step in range(STEPS):
        layer, key = int(draw.integers(3)), int(draw.integers(len(SPACE)))
        experts = draw.permutation(6)[: draw.integers(0, 5)].tolist()
        kind = draw.random()
        if kind < 0.6:
            driver.request(layer, experts)
        elif kind < 0.75:
            driver.prefetch(layer, experts, bool(draw.integers(2)))
        elif kind < 0.82 and sum(driver.pins.values()) < 3:
            driver.pin(key)
        elif kind < 0.92:
            driver.unpin(key)
        elif kind < 0.96:
            driver.drop(key)
        elif kind < 0.98:
            driver.pool.hint(layer, draw.random(6).tolist(), driver.now(layer))
        else:
            driver.pool.new_sequence()
        if step % 10 == 0:
            driver.check()
    driver.check()


def lru(capacity: int) -> Pool:
    return Pool(capacity, cache_policies.get("lru")(SPACE, capacity))


def test_a_full_house_of_pins_bypasses():
    pool = lru(2)
    pool.request([0, 1], Moment(0, 0, 0))
    pool.pin([0, 1])
    access = pool.request([2], Moment(1, 0, 0))
    assert access.bypassed == (2,) and pool.resident == {0, 1} and pool.counts.misses == 3
    pool.unpin([0])
    assert pool.request([2], Moment(2, 0, 0)).loads == ((2, (0,)),)


def test_expected_keys_leave_last():
    pool = lru(3)
    pool.request([0, 1, 2], Moment(0, 0, 0))
    pool.expect(0, [0])
    assert pool.request([6], Moment(1, 0, 1)).loads == ((6, (1,)),)
    assert pool.request([7, 8], Moment(2, 0, 1)).loads == ((7, (2,)), (8, (6,)))
    assert pool.request([9, 10, 11], Moment(3, 0, 1)).loads[-1].victims == (0,)  # nothing else is left


def test_prefetch_leaves_expected_keys_alone():
    pool = lru(2)
    pool.request([0, 1], Moment(0, 0, 0))
    pool.expect(0, [0, 1])
    access = pool.prefetch([6, 7], Moment(1, 0, 1))
    assert access.bypassed == (6, 7) and pool.counts.prefetched == 0


def test_prefetch_is_counted_once():
    pool = lru(3)
    pool.prefetch([0, 1], Moment(0, 0, 0))
    pool.request([0], Moment(1, 0, 0))
    pool.request([0, 2, 3], Moment(2, 0, 0))
    counts = pool.counts
    assert (counts.prefetched, counts.prefetch_used, counts.prefetch_wasted) == (2, 1, 1)
    assert (counts.prefetch_precision, counts.prefetch_recall) == (0.5, 1 / 3)


def test_layers_keep_to_their_quota():
    pools = LayerPools([1, 2, 0], lambda _, slots: cache_policies.get("lru")(SPACE, slots))
    pools.request([0], Moment(0, 0, 0))
    pools.request([6, 7], Moment(1, 0, 1))
    assert pools.request([12], Moment(2, 0, 2)).bypassed == (12,)
    assert pools.request([1], Moment(3, 1, 0)).loads == ((1, (0,)),)
    assert len(pools) == 3 and 1 in pools and 0 not in pools
    pools.drop(1, Moment(4, 1, 0))
    assert pools.counts.evictions == 2 and len(pools) == 2


def test_negative_capacity_is_refused():
    with pytest.raises(UsageError):
        lru(-1)
