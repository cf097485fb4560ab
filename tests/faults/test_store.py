"""Faults S16 and S17: a slow, failing, changed or missing store never gives a wrong token, and never stops for ever."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from moe_prism.jobs.generate import generate
from moe_prism.options.generate import GenerateOptions
from moe_prism.store import RecordReader, StoreError
from tests.store.common import PROMPT, Faults, flaky, logits, opened, smallest, store_of

STEPS = 400
LONG = 100_000


@pytest.fixture
def setting(elastic_tiny, tmp_path):
    """(folder, packed file, model with everything resident, tokenizer, ids, memory of 6 slots)"""
    whole, tokenizer = opened(elastic_tiny, tmp_path / "p")
    return elastic_tiny, tmp_path / "p", whole, tokenizer, tokenizer(PROMPT, return_tensors="pt").input_ids, smallest(whole, 6)


def test_s16_a_slow_store_is_only_slow(setting):
    folder, file, whole, _, ids, memory = setting
    stored, _ = opened(folder, file, memory, reader=flaky(Faults(slow=0.002)), ahead=2)
    assert torch.equal(logits(stored, ids, 0.6), logits(whole, ids, 0.6))
    assert store_of(stored).times.waited > 0


def test_s16_one_read_in_a_hundred_failing_is_not_noticed(setting):
    folder, file, whole, tokenizer, ids, memory = setting
    fault = Faults(failing=0.01)
    stored, _ = opened(folder, file, memory, reader=flaky(fault))
    while fault.failed < 3:
        assert torch.equal(logits(stored, ids, 0.6), logits(whole, ids, 0.6))
    mine = generate(stored, tokenizer, PROMPT, sampling=GenerateOptions(max_tokens=20)).text
    assert mine == generate(whole, tokenizer, PROMPT, sampling=GenerateOptions(max_tokens=20)).text


def test_s16_changed_bytes_are_found_and_read_again(setting):
    folder, file, whole, _, ids, memory = setting
    fault = Faults(flips=0.05)
    stored, _ = opened(folder, file, memory, reader=flaky(fault))
    while fault.failed < 3:
        assert torch.equal(logits(stored, ids, 0.6), logits(whole, ids, 0.6))


def test_s16_a_store_that_always_fails_is_an_error_of_the_request_and_heals(setting):
    folder, file, whole, _, ids, memory = setting
    fault = Faults()
    stored, _ = opened(folder, file, memory, reader=flaky(fault), ahead=2)
    logits(stored, ids[:, :2])
    fault.failing = 1.0
    with pytest.raises(StoreError, match=r"layer \d expert \d part \d cannot be read: Input/output error; check the disk"):
        logits(stored, ids)
    fault.failing = 0.0
    assert torch.equal(logits(stored, ids), logits(whole, ids))
    store = store_of(stored)
    store.settle()
    assert not any(store.fetcher.pool(layer).pinned for layer in range(store.space.layers))
    assert int(store.places.free[0]) + len(store.cache) == store.slots


def test_s16_a_wrong_record_on_disk_is_named_and_never_used(setting):
    folder, file, whole, _, ids, memory = setting
    stored, _ = opened(folder, file, memory)
    pack = store_of(stored).pack
    with file.open("r+b") as handle:
        for key in range(len(pack.space)):
            handle.seek(pack.place(key, False) + 17)
            handle.write(b"\xff\x00\xff")
    with pytest.raises(StoreError, match="wrong checksum"):
        logits(stored, ids)
    del whole


def test_s16_a_removed_file_goes_on_serving(setting):
    folder, file, whole, _, ids, memory = setting
    stored, _ = opened(folder, file, memory)
    file.unlink()
    assert torch.equal(logits(stored, ids), logits(whole, ids))


def test_s16_a_truncated_file_is_named(setting):
    folder, file, _, _, ids, memory = setting
    stored, _ = opened(folder, file, memory)
    os.truncate(file, store_of(stored).pack.start)
    with pytest.raises(StoreError, match=rf"{file.name}.*the file is cut short"):
        logits(stored, ids)


def test_threads_and_descriptors_are_given_back(setting):
    folder, file, _, _, ids, memory = setting
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        stored, _ = opened(folder, file, memory, ahead=2)
        logits(stored, ids)
        store_of(stored).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("steps", [STEPS, pytest.param(LONG, marks=pytest.mark.slow)])
def test_s17_thrashing_at_the_smallest_sizes_makes_progress(setting, steps):
    """Random requests and prefetches on one to three slots per layer, with failures: counts are conserved after every step."""
    folder, file, whole, _, _, _ = setting
    draw = random.Random(1)
    for slots in (1, 2, 4, 7):
        stored, _ = opened(folder, file, smallest(whole, slots), reader=flaky(Faults(failing=0.002)))
        store, space = store_of(stored), store_of(stored).space
        reference = store_of(whole)
        for _ in range(steps // 4):
            layer = draw.randrange(space.layers)
            x = torch.randn(2, 32)
            index = torch.tensor([draw.sample(range(space.experts), 2) for _ in range(2)])
            keep = torch.rand(2, 2, space.parts) < draw.random()
            if draw.random() < 0.3:
                store.prefetch(layer, draw.sample(space.of_layer(layer), draw.randrange(5)))
            weight = torch.rand(2, 2)
            wanted = store.wanted(layer, index, weight, keep)
            assert torch.equal(store.run(layer, x, wanted), reference.run(layer, x, wanted))
            counts = store.cache.counts
            assert counts.requested == counts.hits + counts.misses
            assert counts.loads + counts.prefetched - counts.evictions == len(store.cache) <= store.slots
            assert int(store.places.free[0]) + len(store.cache) == store.slots
        store.close()


def test_reads_past_the_page_cache_where_the_file_system_allows(setting):
    folder, file, *_ = setting
    stored, _ = opened(folder, file)
    reader = store_of(stored).reader
    assert isinstance(reader, RecordReader)
    lines = Path(f"/proc/self/fdinfo/{reader._descriptor}").read_text().splitlines()
    flags = int(next(line for line in lines if line.startswith("flags")).split()[1], 8)
    assert bool(flags & os.O_DIRECT) == reader.direct
