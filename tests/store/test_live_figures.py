"""What a running store says of itself: its counts are the cache's, its bound is Belady's."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.offload.base import Moment
from moe_prism.offload.cache.belady import Belady
from moe_prism.offload.cache.pool import LayerPools, Pool
from moe_prism.offload.keys import KeySpace
from moe_prism.serve.backend import ExpertReads
from moe_prism.store import live_figures
from moe_prism.store.live_figures import LiveFigures, StoreFigures, belady_misses
from tests.store.common import PROMPT, logits, opened, smallest, store_of

LAYERS, KEYS = 2, 8


@settings(max_examples=60, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 6), shared=st.booleans())
def test_the_bound_is_that_of_the_policy_that_knows_the_future(data, capacity, shared):
    space = KeySpace(LAYERS, KEYS)
    steps = data.draw(st.integers(1, 12))
    group = st.lists(st.integers(0, KEYS - 1), unique=True, min_size=0, max_size=KEYS)
    groups = [(layer, [layer * KEYS + k for k in data.draw(group)]) for _ in range(steps) for layer in range(LAYERS)]

    def policy(_layer, slots):
        return Belady(space, slots)

    cache = Pool(capacity, policy(0, capacity)) if shared else LayerPools([capacity] * LAYERS, policy)
    uses = {}
    for clock, (_, keys) in enumerate(groups):
        for key in keys:
            uses.setdefault(key, []).append(clock)
    cache.foresee(uses)
    since, missed = len(groups) // 2, 0
    for clock, (layer, keys) in enumerate(groups):
        for chunk in cache.chunks(keys, layer) if len(keys) > capacity else [keys]:
            access = cache.request(chunk, Moment(clock, clock // LAYERS, layer))
            missed += (len(access.loads) + len(access.bypassed)) * (clock >= since and len(keys) <= capacity)
    fits = all(len(keys) <= capacity for _, keys in groups)
    ends = np.cumsum([len(keys) for _, keys in groups])
    every = np.array([k for _, keys in groups for k in keys], np.int64)
    pool = np.array([0 if shared else layer for layer, _ in groups])
    capacities = np.array([capacity] if shared else [capacity] * LAYERS)
    found = belady_misses(every, ends, pool, capacities, LAYERS * KEYS if shared else KEYS, since)
    if fits:
        assert found == missed
    assert 0 <= found <= len(every)


def looked(figures):
    """The rates of the window once they are computed."""
    figures.of_window()
    figures.settle()
    return figures.of_window()


def test_who_asks_never_computes_the_bound(monkeypatch):
    threads, hold = [], threading.Event()

    def slow(*given):
        threads.append(threading.get_ident())
        assert hold.wait(30)
        return belady_misses(*given)

    monkeypatch.setattr(live_figures, "belady_misses", slow)
    own = LiveFigures(KeySpace(1, 8), [4])
    for step in range(8):
        own.note(0, np.array([step % 8]), 1)
    for _ in range(100):  # an engine's steps, while one computation goes on
        assert own.of_window() == (None, None)
    hold.set()
    own.settle()
    assert own.of_window()[0] == 0.0
    assert len(threads) == 1 and threads[0] != threading.get_ident()


def test_the_window_is_bounded_and_forgets(monkeypatch):
    monkeypatch.setattr(live_figures, "MOST_KEYS", 64)
    own = LiveFigures(KeySpace(1, 8), [4])
    assert looked(own) == (None, None)
    for step in range(400):
        own.note(0, np.arange(4) if step < 200 else np.array([step % 8]), 4 if step == 0 else 1)
        assert own._held <= 64
    own._due = 0.0
    rate, bound = looked(own)
    assert rate == 0.0 and 0 < bound < 1  # 8 keys in turns, 4 fit: the cache that ran had none of them
    assert (own.requested, own.missed) == (4 * 200 + 200, 4 + 399)
    assert own.of_window() == (rate, bound)


def test_work_of_the_bound_is_bounded():
    assert LiveFigures(KeySpace(64, 256, 8), [1000]).most * 64 * 256 * 8 <= live_figures.MOST_WORK
    assert LiveFigures(KeySpace(64, 256, 8), [1000] * 64).most == live_figures.MOST_WORK // (256 * 8)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_store_counts_what_its_cache_counts(elastic_tiny, tmp_path, compiled):
    whole, tokenizer = opened(elastic_tiny, tmp_path / "p")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model, _ = opened(elastic_tiny, tmp_path / "p", smallest(whole, 12))
    store = store_of(model)
    store.compiled = compiled
    for i in range(ids.shape[1]):
        logits(model, ids[:, i : i + 1], 0.6)
    looked(store.fetcher.figures)
    found, counts = store.figures(), store.cache.counts
    assert (found.steps, found.tokens) == (ids.shape[1], ids.shape[1])
    assert (found.requested, found.missed) == (counts.requested, counts.misses)
    assert found.bytes == found.missed * store.pack.layout.bytes and found.waited > 0
    assert 0 <= found.hit_rate <= found.bound + 0.05 <= 1.05  # the bound begins with an empty cache
    store.forget_figures()
    assert store.figures()[:5] == (0, 0, 0, 0, 0)
    store.close()


def test_a_server_names_the_same_figures():
    assert StoreFigures._fields == ExpertReads._fields
    assert Counter(StoreFigures._field_defaults) == Counter(ExpertReads._field_defaults)
