"""Faults S16 and S17 for fast memory in front of host memory in front of a disk: no wrong token, and nothing waits for ever."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from moe_prism.errors import UsageError
from moe_prism.store import StoreError
from moe_prism.store.choose_misses import Misses
from moe_prism.store.device import SimulatedDevice
from moe_prism.store.tiers import Tier
from tests.store.common import PROMPT, Faults, flaky, logits, opened, smallest, store_of
from tests.tiers import by_night

STEPS, LONG = 300, 100_000


@pytest.fixture
def setting(elastic_tiny, tmp_path):
    """(folder, packed file, model with everything resident, ids)"""
    whole, tokenizer = opened(elastic_tiny, tmp_path / "p")
    return elastic_tiny, tmp_path / "p", whole, tokenizer(PROMPT, return_tensors="pt").input_ids


def tier(slots, bandwidth=1e9, latency=0.0, **rest):
    return Tier(slots, SimulatedDevice(bandwidth, latency), **rest)


@pytest.mark.parametrize("computes", [True, False])
@pytest.mark.parametrize(("fast", "host"), by_night([(1, 1), (3, 5), (8, 12), (12, 4), (1000, 1000)], (1, 1), (8, 12)))
def test_the_same_bits_whatever_lies_where(setting, fast, host, computes):
    folder, file, whole, ids = setting
    stored, _ = opened(folder, file, smallest(whole, fast), tier=tier(host, latency=1e-5, computes=computes), ahead=2)
    for budget in (1.0, 0.6):
        assert torch.equal(logits(stored, ids, budget), logits(whole, ids, budget))
        for i in range(4):
            assert torch.equal(logits(stored, ids[:, i : i + 1], budget), logits(whole, ids[:, i : i + 1], budget))
    store = store_of(stored)
    store.settle()
    assert not store.host.fetcher.cache.pinned and not store.reader._jobs
    assert store.host.arena.memory.shape[0] == min(host, len(store.space)) and store.arena.memory.shape[0] == store.slots
    store.close()


def test_the_processor_computes_what_is_cheaper_to_compute_than_to_copy(setting):
    folder, file, whole, ids = setting
    counts = {}
    for latency in (0.0, 0.02):
        stored, _ = opened(folder, file, smallest(whole, 16), tier=tier(64, bandwidth=1e12, latency=latency))
        store = store_of(stored)
        store.row_seconds = 1e-3  # between the two: a measured rate would make the test one of time
        for i in range(6):
            assert torch.equal(logits(stored, ids[:, i : i + 1]), logits(whole, ids[:, i : i + 1]))
        counts[latency] = store.on_host, store.tier.device.copied
        store.close()
    assert counts[0.0][0] == 0 < counts[0.02][0]
    assert counts[0.02][1] < counts[0.0][1]


def test_reads_are_hidden_behind_the_copies_of_others_and_bytes_come_late():
    device = SimulatedDevice(1e6, 0.0)
    source, target = torch.ones(2000, dtype=torch.uint8), torch.zeros(2000, dtype=torch.uint8)
    first, second = device.copy(source, target), device.copy(source, target)
    assert not first.done and not target.any()  # nothing is there before it has arrived
    second.wait()
    assert first.done and target.all()
    with pytest.raises(UsageError, match="positive bandwidth"):
        SimulatedDevice(0)


def test_what_is_refused(setting):
    folder, file, whole, _ = setting
    with pytest.raises(UsageError, match="holds none"):
        tier(0)
    del whole
    with pytest.raises(UsageError, match="no int8 forms"):
        opened(folder, file.with_name("low"), tier=tier(4), misses=Misses(0.5, low=0.7))


def test_s16_failing_reads_are_errors_of_the_request_and_heal(setting):
    folder, file, whole, ids = setting
    fault = Faults()
    stored, _ = opened(folder, file, smallest(whole, 6), reader=flaky(fault), tier=tier(9), ahead=2)
    logits(stored, ids[:, :2])
    fault.failing = 1.0
    with pytest.raises(StoreError, match=r"cannot be read: Input/output error"):
        logits(stored, ids)
    fault.failing = 0.0
    assert torch.equal(logits(stored, ids), logits(whole, ids))
    store = store_of(stored)
    store.settle()
    host = store.host.fetcher
    assert not host.cache.pinned and int(host.places.free[0]) + len(host.cache) == store.host.capacity
    assert int(store.places.free[0]) + len(store.cache) == store.slots
    store.close()


def test_s16_slow_and_changed_reads_are_only_slow(setting):
    folder, file, whole, ids = setting
    fault = Faults(slow=0.0005, flips=0.03)
    stored, _ = opened(folder, file, smallest(whole, 6), reader=flaky(fault), tier=tier(9, latency=1e-4))
    while fault.failed < 3:
        assert torch.equal(logits(stored, ids, 0.6), logits(whole, ids, 0.6))
    store_of(stored).close()


@pytest.mark.parametrize("steps", [STEPS, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_s17_thrashing_at_the_smallest_sizes_makes_progress(setting, steps):
    """Random requests and prefetches at the smallest sizes, with failures: the same sums, and counts are conserved in both tiers."""
    folder, file, whole, _ = setting
    draw = random.Random(1)
    sizes = [(1, 1), (4, 2), (6, 9), (12, 12)]
    for fast, host in sizes:
        reader = flaky(Faults(failing=0.002))
        stored, _ = opened(folder, file, smallest(whole, fast), reader=reader, tier=tier(host, bandwidth=1e10))
        store, reference = store_of(stored), store_of(whole)
        space, own = store.space, store.host.fetcher
        store.row_seconds = draw.choice([0.0, 1.0])
        for _ in range(steps // len(sizes)):
            layer = draw.randrange(space.layers)
            x, weight = torch.randn(2, 32), torch.rand(2, 2)
            index = torch.tensor([draw.sample(range(space.experts), 2) for _ in range(2)])
            keep = torch.rand(2, 2, space.parts) < draw.random()
            if draw.random() < 0.3:
                store.prefetch(layer, draw.sample(space.of_layer(layer), draw.randrange(5)))
            wanted = store.wanted(layer, index, weight, keep)
            assert torch.equal(store.run(layer, x, wanted), reference.run(layer, x, wanted))
            for cache, places, slots in ((store.cache, store.places, store.slots), (own.cache, own.places, store.host.capacity)):
                counts = cache.counts
                assert counts.requested == counts.hits + counts.misses
                assert counts.loads + counts.prefetched - counts.evictions == len(cache) <= slots
                assert int(places.free[0]) + len(cache) == slots
                assert len(np.unique(places.of[places.of >= 0])) == len(cache)
        store.close()
