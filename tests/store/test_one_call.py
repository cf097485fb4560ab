"""A layer's step by compiled calls is what its parts give one after the other: the same bits, the same cache, the same reads."""

from __future__ import annotations

import pytest
import torch

from moe_prism.elastic import operating_point
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.point import FULL, OperatingPoint, SlotRule
from moe_prism.store import StoreError
from moe_prism.store.one_call import StoredCall
from tests.store.common import PROMPT, flaky, opened, smallest, store_of
from tests.tiny_sources import save_tiny

POINTS = {
    "full": FULL,
    "budget": FULL.with_budget(0.6),
    "held for nobody": FULL.with_budget(0.6, control="none"),
    "product": OperatingPoint(slots=SlotRule(rule="product", budget=0.5)),
}


@pytest.fixture(scope="module")
def half(shared, tmp_path_factory, tiny_calibration):
    """The tiny model stored as bfloat16, with gate neurons."""
    source = tmp_path_factory.mktemp("half") / "m"
    save_tiny("olmoe", source, dtype=torch.bfloat16)
    return shared("elastic-half", lambda out: refactor(source, out, RefactorOptions(calibration=tiny_calibration)))


@torch.no_grad()
def decoded(model, ids, point, steps=12, rows=1):
    """Logits of decode steps after a prompt, and what the cache counted."""
    found, ids = [], ids.repeat(rows, 1)
    with operating_point(model, point=point):
        out = model(input_ids=ids[:, :4], use_cache=True)
        for i in range(4, 4 + steps):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, 1), store_of(model).cache.counts


def counted(monkeypatch):
    """How often a step goes by compiled calls."""
    calls, own = [], StoredCall.__call__
    monkeypatch.setattr(StoredCall, "__call__", lambda self, *rest: (calls.append(self), own(self, *rest))[1])
    return calls


@pytest.mark.parametrize(
    ("folder", "point", "policy"),
    [
        *(pytest.param("half", point, "lfu", marks=() if point == "budget" else pytest.mark.slow) for point in POINTS),
        pytest.param("half", "budget", "lru", marks=pytest.mark.slow),
        ("elastic_tiny", "budget", "edge-moe"),
    ],
)
def test_the_same_bits_and_the_same_cache(folder, point, policy, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(folder)
    whole, tokenizer = opened(folder, tmp_path / "p")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    space, calls = store_of(whole).space, counted(monkeypatch)
    for slots in (3, len(space) // 2, len(space)):
        for rows in (1, 2):
            made = [opened(folder, tmp_path / "p", smallest(whole, slots), policy=policy)[0] for _ in range(2)]
            store_of(made[1]).compiled = False
            (fast, counts), (slow, others) = (decoded(model, ids, POINTS[point], rows=rows) for model in made)
            assert torch.equal(fast, slow)
            assert counts == others
            assert store_of(made[0]).times.bytes == store_of(made[1]).times.bytes
            for layer in range(space.layers):
                assert (store_of(made[0]).resident(layer) == store_of(made[1]).resident(layer)).all()
            for model in made:
                store_of(model).close()
    assert calls  # it did go that way


@pytest.mark.parametrize("point", POINTS)
def test_reading_ahead_changes_no_bit(half, point, tmp_path):
    whole, tokenizer = opened(half, tmp_path / "p")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted, _ = decoded(whole, ids, POINTS[point])
    for slots in (3, len(store_of(whole).space) // 2):
        model, _ = opened(half, tmp_path / "p", smallest(whole, slots), ahead=4)
        found, counts = decoded(model, ids, POINTS[point])
        assert torch.equal(found, wanted)
        assert counts.prefetched or slots == 3
        store_of(model).close()


def test_counting_sees_the_slots_of_compiled_steps(half, tmp_path):
    """Whoever looks at what was kept gets the same, by either way."""
    seen = []
    for compiled in (True, False):
        model, tokenizer = opened(half, tmp_path / "p")
        store_of(model).compiled = compiled
        ids, kept = tokenizer(PROMPT, return_tensors="pt").input_ids, []
        for layer in model._moe_prism.layers:
            layer.on_kept = lambda index, keep, kept=kept: kept.append(keep)
        decoded(model, ids, POINTS["budget"])
        seen.append(kept)
    assert len(seen[0]) == len(seen[1])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_shrunk_store_and_a_failing_read(half, tmp_path):
    broken = []

    def read(descriptor, buffers, offset):
        import os

        if broken:
            raise OSError("no")
        return os.preadv(descriptor, buffers, offset)

    model, tokenizer = opened(half, tmp_path / "p", reader=flaky(read))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted, _ = decoded(model, ids, POINTS["budget"])
    store = store_of(model)
    assert store.shrink(len(store.space) // 2) > 0
    assert torch.equal(decoded(model, ids, POINTS["budget"])[0], wanted)
    broken.append(True)
    with pytest.raises(StoreError, match="cannot be read"):
        for _ in range(4):
            decoded(model, ids, POINTS["full"])
    broken.clear()
    assert torch.equal(decoded(model, ids, POINTS["budget"])[0], wanted)
