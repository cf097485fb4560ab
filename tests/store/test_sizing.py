"""Memory that nobody named: what is left beside the rest, and slots that are given back."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from moe_prism.artefact.load import load
from moe_prism.store import StoreOptions, sizing
from tests.store.common import PROMPT, logits, smallest, store_of

MIB = 1 << 20


def opened(folder, file, memory):
    return load(folder, store=StoreOptions(memory, file))


@pytest.fixture
def ids(elastic_tiny):
    return load(elastic_tiny)[1](PROMPT, return_tensors="pt").input_ids


def test_experts_get_what_is_left_and_never_more_than_there_are(elastic_tiny, tmp_path, monkeypatch, ids, caplog):
    caplog.set_level("INFO", "moe_prism.store.load")
    model, _ = opened(elastic_tiny, tmp_path / "p", None)
    store = store_of(model)
    assert store.slots == len(store.space) and "stay free" in caplog.text
    wanted = logits(model, ids, 0.6)
    monkeypatch.setattr(sizing, "total_memory", lambda: 1000 * MIB)
    few = 8
    beside = sizing.cache_bytes(model, StoreOptions.cache_tokens)
    free = smallest(model, few) + 50 * MIB + sizing.WORK + beside + store.pack.layout.bytes // 2
    monkeypatch.setattr(sizing, "available_memory", lambda: free)
    small, _ = opened(elastic_tiny, tmp_path / "p", None)
    assert store_of(small).slots == few
    assert torch.equal(logits(small, ids, 0.6), wanted)


@pytest.mark.parametrize("share", [1.0, 0.6])  # one pool for every layer, or one for all
def test_slots_are_given_back_and_the_answers_stay(elastic_tiny, tmp_path, ids, share):
    whole, _ = opened(elastic_tiny, tmp_path / "p", 1 << 30)
    every = len(store_of(whole).space)
    model, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, int(every * share)))
    store = store_of(model)
    wanted = logits(model, ids)
    before = store.in_use
    given = store.shrink(before // 2)
    assert given > 0 and store.in_use == before - given >= before // 2 and len(store.cache) <= store.in_use
    for _ in range(3):
        assert torch.equal(logits(model, ids), wanted)
        assert len(store.cache) <= store.in_use
    counts = store.cache.counts
    assert counts.loads + counts.prefetched - counts.evictions == len(store.cache)
    assert store.shrink(every) == 0  # it does not grow


def test_the_pages_go_back_to_the_system(elastic_tiny, tmp_path):
    """An arena of records that are written to, as reads do."""
    model, _ = opened(elastic_tiny, tmp_path / "p", 1 << 30)
    store = store_of(model)
    page, status = resource.getpagesize(), Path("/proc/self/statm")

    def held():
        """Shared memory of this process, in bytes."""
        return int(status.read_text().split()[2]) * page

    if not status.exists():
        pytest.skip("no /proc here")
    store.arena.memory[:] = 1
    full = held()
    for key in [key for key in range(len(store.space)) if key in store.cache]:
        store.places.vacate(key)
    given = store.shrink(store.in_use // 2) * store.pack.layout.bytes
    assert full - held() >= given - 2 * page


def test_a_forecast_is_corrected_once_after_the_first_steps(elastic_tiny, tmp_path, monkeypatch, ids):
    model, _ = opened(elastic_tiny, tmp_path / "p", None)
    store = store_of(model)
    monkeypatch.setattr(sizing, "STEPS", 2)
    store.on_step = sizing.FirstSteps(store)
    monkeypatch.setattr(sizing, "total_memory", lambda: 100 * MIB)
    wanted, before = logits(model, ids), store.in_use
    still = int(store.places.free[0]) * store.pack.layout.bytes
    lacking = 4 * store.pack.layout.bytes
    monkeypatch.setattr(sizing, "available_memory", lambda: sizing.kept_free() + still - lacking)
    assert torch.equal(logits(model, ids), wanted)
    assert store.on_step is None and before - store.in_use >= 4
    after = store.in_use
    for _ in range(3):
        assert torch.equal(logits(model, ids), wanted)
    assert store.in_use == after
