"""The store's pool is `Pool`, call by call; native reads are those of `os.preadv`; native widening is torch's."""

from __future__ import annotations

import os

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.offload.base import KeySpace, Moment
from moe_prism.offload.cache import LayerPools, Pool, cache_policies
from moe_prism.offload.cache.declared import ranking_of
from moe_prism.offload.cache.lfu import LFU
from moe_prism.store.checksum import checksum
from moe_prism.store.fast_pool import SlotTable, TablePool
from moe_prism.store.layout import RecordLayout
from moe_prism.store.native import FAILED, OK, RUN, SHORT, WRONG, read_records, widen_bfloat16
from moe_prism.store.pools import Eviction, policy_for, pools
from moe_prism.store.reader import Item, runs, shares
from moe_prism.store.unit_pool import UnitPool

SPACE = KeySpace(2, 4, 2, planes=2)
LATER = st.lists(st.sampled_from(list(SPACE.of_layer(1))), unique=True, max_size=8)
KEYS = st.lists(st.integers(0, len(SPACE) - 1), unique=True, max_size=8)
CALLS = ["request", "request", "prefetch", "expect", "pin", "unpin", "drop", "new sequence"]
TABLES = {
    "lru": {},
    "fifo": {},
    "lfu": {"half_life": 3.0},
    "lfru": {},
    "edge-moe": {},
    "per-byte": {"half_life": 3.0},
    "d2moe": {},
    "static": {"profile": [float(key % 5) for key in range(len(SPACE))]},
    "hobbit": {"mix": (0.25, 0.5, 0.125, 0.125), "high": 0.3},
    "reuse": {"coefficients": [[1.0, 0.5, 0.25, 2.0], [0.5, -0.25, 1.0, 0.0]]},
}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["lru", "lfu", "arc", "reuse"]),
    st.integers(0, 9),
    st.lists(st.tuples(st.sampled_from(["request", "prefetch", "expect", "pin", "unpin", "drop"]), KEYS), max_size=40),
)
def test_the_pool_answers_and_counts_as_the_general_one(name, capacity, calls):
    policy = cache_policies.get(name)
    pools = [kind(capacity, policy(SPACE, capacity)) for kind in (Pool, UnitPool)]
    pinned: list[int] = []
    for step, (call, keys) in enumerate(calls):
        now = Moment(step * 2, step, step % 2)
        if call in ("request", "prefetch"):
            first, second = (getattr(pool, call)(keys, now) for pool in pools)
            assert first == second
        elif call == "expect":
            for pool in pools:
                pool.expect(step % 2, keys)
        elif call == "pin":
            pinned += keys
            for pool in pools:
                pool.pin(keys)
        elif call == "unpin" and pinned:
            key = pinned.pop()
            for pool in pools:
                pool.unpin([key])
        elif call == "drop":
            for key in [k for k in keys if k in pools[0]]:
                for pool in pools:
                    pool.drop(key, now)
        assert pools[0].counts == pools[1].counts
        assert pools[0].resident == pools[1].resident


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TABLES)),
    st.integers(0, 9),
    st.lists(st.tuples(st.sampled_from(CALLS), LATER), max_size=40),
)
def test_the_table_answers_and_counts_as_a_pool(name, capacity, calls):
    """Of the second layer; and every key that is there has a slot of its own."""
    policy = cache_policies.get(name)(SPACE, capacity, **TABLES[name])
    slots = SlotTable.new(len(SPACE), capacity)
    pools = [Pool(capacity, policy), TablePool(capacity, SPACE, SPACE.of_layer(1), ranking_of(policy), slots)]
    pinned: list[int] = []
    for step, (call, keys) in enumerate(calls):
        now = Moment(step * 2, step, 1)
        if call in ("request", "prefetch"):
            assert pools[0].chunks(keys, 1) == pools[1].chunks(keys, 1) or not capacity
            weights = {"weights": [(7 * key + step) % 5 / 8 for key in keys]} if call == "request" else {}
            first, second = (getattr(pool, call)(keys, now, **weights) for pool in pools)
            assert first == second
        for pool in pools:
            if call == "new sequence":
                pool.new_sequence()
            if call == "expect":
                pool.expect(1, keys)
            elif call == "pin":
                pool.pin(keys)
            elif call == "unpin":
                pool.unpin(pinned[-1:])
            elif call == "drop":
                for key in [k for k in keys if k in pool]:
                    pool.drop(key, now)
                    if pool is pools[1]:
                        slots.vacate(key)
        pinned = pinned + keys if call == "pin" else pinned[:-1] if call == "unpin" else pinned
        assert pools[0].counts == pools[1].counts
        assert pools[0].pinned == pools[1].pinned
        there = {key for key in SPACE.of_layer(1) if key in pools[1]}
        assert there == pools[0].resident
        taken = [slots.of[key] for key in there]
        assert len(set(taken)) == len(taken) == len(pools[1]) == (slots.of >= 0).sum() == capacity - slots.free[0]
        assert sorted([*taken, *slots.free[1 : 1 + slots.free[0]]]) == list(range(capacity))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(TABLES)), st.integers(1, 9), st.lists(st.tuples(st.integers(0, 1), KEYS), max_size=40))
def test_a_table_for_all_layers_answers_as_a_pool(name, capacity, calls):
    """Requests of one layer after the other; keys of the other layer leave for them."""
    policy = cache_policies.get(name)(SPACE, capacity, **TABLES[name])
    slots = SlotTable.new(len(SPACE), capacity)
    pools = [Pool(capacity, policy), TablePool(capacity, SPACE, range(len(SPACE)), ranking_of(policy), slots)]
    for step, (layer, keys) in enumerate(calls):
        own = [k for k in keys if SPACE.layer(k) == layer]
        first, second = (pool.request(own, Moment(step * 2 + layer, step, layer)) for pool in pools)
        assert first == second
        assert pools[0].counts == pools[1].counts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), unique=True, max_size=40), st.integers(1, 6))
def test_what_is_asked_for_is_shared_out_once(asked, threads):
    items = [Item(key, slot, low) for slot, (key, low) in enumerate(asked)]
    for cut in (runs(items), shares(items, threads)):
        assert sorted(i for part in cut for i in part) == sorted(items)
        assert all(
            part and len({i.low for i in part}) == 1 and [i.key for i in part] == sorted(i.key for i in part) for part in cut
        )
    assert all(len(run) <= RUN and run[-1].key - run[0].key == len(run) - 1 for run in runs(items))


def test_native_reads_put_every_record_in_its_slot(tmp_path):
    size, count = 4096, 20
    data = np.random.default_rng(0).integers(0, 2**63, (count, size // 8)).astype(np.uint64)
    (tmp_path / "f").write_bytes(data.tobytes())
    sums = np.array([checksum(row) for row in data], np.uint64)
    keys = np.array([0, 1, 2, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 19])
    slots = np.random.default_rng(1).permutation(count)[: len(keys)]
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    for skip in (0, 8):
        arena = np.zeros((count, size // 8 + skip), np.uint64)
        assert (read_records(descriptor, arena, slots, keys * size, skip, sums[keys]) == OK).all()
        assert (arena[slots, skip:] == data[keys]).all()
        assert arena.sum() == data[keys].sum()
        wrong = sums[keys].copy()
        wrong[3] ^= np.uint64(1)
        assert read_records(descriptor, arena, slots, keys * size, skip, wrong).tolist() == [0, 0, 0, WRONG] + [0] * 11
    os.truncate(tmp_path / "f", 16 * size)
    assert read_records(descriptor, arena, slots, keys * size, 8, sums[keys]).tolist() == [0] * 13 + [SHORT] * 2
    os.close(descriptor)
    assert (read_records(descriptor, arena, slots, keys * size, 8, sums[keys]) == FAILED).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 50), st.integers(0, 9))
def test_native_widening_is_that_of_the_layout(hidden, block, seed):
    layout = RecordLayout(hidden, block, True, False, "bfloat16")
    if layout.low_bytes > layout.bytes:
        return
    torch.manual_seed(seed)
    numbers = torch.randn(1, layout.weights).to(torch.bfloat16)
    records = torch.nn.functional.pad(numbers.view(torch.uint8), (0, layout.bytes - numbers.shape[1] * 2))
    slot = torch.zeros(layout.bytes, dtype=torch.uint8)
    slot[layout.bytes - layout.low_bytes :] = layout.lowered(records)[0]
    other = slot.clone()
    layout.raise_(slot)
    widen_bfloat16(other.numpy(), layout.rows, hidden, layout.bytes - layout.low_bytes)
    assert torch.equal(slot[: 2 * layout.weights], other[: 2 * layout.weights])


def test_one_pool_serves_all_layers_where_half_a_token_does_not_fit_into_one_of_a_layer():
    """A token wants 4 keys of each layer."""
    layers = SPACE.layers
    kinds = [
        type(pools(Eviction(cache_policies.get("lfu"), group=4), SPACE, slots)) for slots in (layers, 2 * layers - 1, 2 * layers)
    ]
    assert kinds == [TablePool, TablePool, LayerPools]
    assert [policy_for(SPACE, slots, 4) for slots in (layers, 2 * layers)] == ["edge-moe", "lfu"]


def test_a_sweep_over_all_layers_keeps_something():
    """Every key is wanted in every step: recency and counts keep nothing, distance to the layer does."""
    rates = {}
    for name in ("lru", "lfu", "edge-moe"):
        space = KeySpace(6, 1, 4)
        pool = pools(Eviction(cache_policies.get(name), group=4), space, 8)
        for step in range(20):
            for layer in range(space.layers):
                pool.request(list(space.of_layer(layer)), Moment(step * space.layers + layer, step, layer))
        rates[name] = pool.counts.hit_rate
    assert rates["lru"] == rates["lfu"] == 0
    assert rates["edge-moe"] > 0.1


def test_every_policy_that_can_be_ranked_has_a_table():
    """The others keep lists whose lengths move (arc), draw (random) or know the future: a store asks those in Python."""
    made = {name: cache_policies.get(name)(SPACE, 4) for name in cache_policies.names()}
    assert {name for name, policy in made.items() if ranking_of(policy) is not None} == set(TABLES)


class Bribed(LFU):
    """Declares nothing anew, but decides in another way."""

    def worth(self, key, now):
        return -super().worth(key, now)


class Faster(LFU):
    """Another half-life, and all else as declared."""

    def __init__(self, *args, **settings):
        super().__init__(*args, half_life=2.0, **settings)


def test_a_plug_in_has_the_table_that_it_declares_and_no_other():
    assert ranking_of(Bribed(SPACE, 4)) is None
    assert type(pools(Eviction(Bribed, group=4), SPACE, 1)) is UnitPool
    assert ranking_of(Faster(SPACE, 4)).half_lives[0] == 2.0
    assert type(pools(Eviction(Faster, group=4), SPACE, 1)) is TablePool


def test_high_planes_leave_first_and_the_oldest_of_them():
    pool = pools(Eviction(cache_policies.get("d2moe"), group=4), SPACE, 8).pools[0]
    for step, keys in enumerate(([0, 1], [2, 3], [4], [6])):
        pool.request(keys, Moment(2 * step, step, 0))
    assert [key for key in range(8) if key in pool] == [0, 2, 4, 6]  # both lower planes are gone, and all upper ones are there
    assert type(pool) is TablePool
