"""Records of planes: what the model in memory computes, whatever is resident; no plane is read that no slot asks for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_prism.artefact.load import load
from moe_prism.checkpoint import read_manifest
from moe_prism.compress.codec.nested import Nested
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.elastic import operating_point
from moe_prism.errors import CorruptError, DoesNotFit, UsageError
from moe_prism.jobs.compress import compress_model, plan_compression
from moe_prism.jobs.forecast_offload import forecast_offload
from moe_prism.jobs.forecast_planes import filling
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.offload.cache import cache_policies
from moe_prism.options.compress import CompressOptions
from moe_prism.options.offload import OffloadOptions
from moe_prism.point import FULL, OperatingPoint, SlotBits, SlotRule
from moe_prism.point.named import NamedPoint, write_point
from moe_prism.store import StoreError, open_pack, write_pack
from moe_prism.store.choose_misses import Misses
from moe_prism.store.plane_layout import PlaneLayout, PlaneStorage
from moe_prism.store.pools import Eviction
from moe_prism.store.price_planes import asked_planes, measure_plane_prices
from moe_prism.store.price_reads import replayed
from tests.store.common import PROMPT, Faults, flaky, logits, opened, smallest, store_of
from tests.tiny_sources import save_tiny

pytest.importorskip("numba")
from moe_prism.kernels.plane_tiles import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this processor has no products of bytes")

STORAGE = PlaneStorage(group=32)
BITS = SlotBits(widths=(2.0, 3.0, 4.0, 6.0, 8.0), errors=((0.15, 0.04, 0.01, 0.001, 0.0001),) * 2, group=32, choosing=4.0)
CLOSE = {"rtol": 2e-3, "atol": 2e-3}  # of logits about 4: inputs and activations are rounded to 16 bits, in either place


def at(budget: float, **bits) -> OperatingPoint:
    return OperatingPoint(slots=SlotRule(rule="bits", budget=budget, bits=replace(BITS, **bits)))


@pytest.fixture(scope="module", params=[0, pytest.param(4, marks=pytest.mark.slow)], ids=["no gates", "gates"])
def folder(request, shared, tmp_path_factory, tiny_calibration):
    source = tmp_path_factory.mktemp("wide") / "m"
    save_tiny("olmoe", source, hidden_size=64, intermediate_size=128, num_experts=6)
    options = RefactorOptions(calibration=tiny_calibration, gates=request.param, n_sub=4)
    return shared(f"elastic-wide-{request.param}", lambda out: refactor(source, out, options))


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("planes") / "planes.pack"
    write_pack(folder, path, read_manifest(folder), planes=STORAGE)
    return path


@pytest.fixture(scope="module")
def ids(folder):
    return load(folder)[1](PROMPT, return_tensors="pt").input_ids


def test_records_hold_what_the_codec_encodes(folder, file):
    pack, model = open_pack(file, read_manifest(folder)), load(folder, torch.float32)[0]
    layout, layer = pack.layout, model._moe_prism.layers[1].parts.layer
    assert isinstance(layout, PlaneLayout) and pack.space.parts == 8 and layout.planes == 2
    records = layout.records(layer, 8)
    assert records.shape == (6 * 8, layout.bytes)
    raw = np.fromfile(file, np.uint8, offset=pack.place(6 * 8, False), count=records.numel())
    assert np.array_equal(raw.reshape(records.shape), records.numpy())
    lower = records[1::2]
    for matrix in (*layout.first, layout.down):  # the gap of the lower plane is empty, where the upper one has scales
        assert not lower[:, matrix.at : matrix.at + matrix.scales].any()


def test_the_command_writes_the_same_file(folder, file, tmp_path):
    asked, out = CompressOptions(method="nested:bits=8:group=32", format="records"), tmp_path / "planes.pack"
    planned = plan_compression(folder, asked)
    done = compress_model(folder, out, asked)
    assert out.read_bytes() == file.read_bytes() and done.expert_bytes == planned.expert_bytes
    assert done.expert_bytes[1] == 2 * 2 * 6 * 4 * open_pack(out, read_manifest(folder)).layout.bytes


@pytest.mark.slow
def test_a_forecast_replays_what_the_store_asks_for(folder, file, ids, tmp_path):
    """Every way is there; less bits read less, and the misses of a policy are those of a run under it."""
    point = tmp_path / "point.json"
    write_point(point, NamedPoint(name="quarter", point=at(0.25)))
    whole, _ = opened(folder, file)
    memory = smallest(whole, 48)
    asked = OffloadOptions(expert_file=file, tokens=160, point=[str(point)])
    found = forecast_offload(folder, memory, asked)
    assert {way.point for way in found.ways} == {"", str(point)} and {way.precision for way in found.ways} == {"planes"}
    assert found.slots == 48 and all(way.ms_per_token > 0 and 0 <= way.hit_rate <= 1 for way in found.ways)
    reads = {way.point: way.reads_per_token for way in found.ways if way.policy == "lfu"}
    assert reads[str(point)] < reads[""]
    slow = forecast_offload(folder, memory, OffloadOptions(expert_file=file, tokens=160, point=[str(point)], link="1MB"))
    assert slow.best.ms_per_token > found.best.ms_per_token
    for wrong in ({"budgets": (0.5,)}, {"expert_ahead": 2}):
        with pytest.raises(UsageError, match="forecast"):
            forecast_offload(folder, memory, OffloadOptions(expert_file=file, tokens=160, **wrong))


def test_prompts_and_the_first_half_of_the_texts_fill_the_cache():
    assert filling([0, 3, 6, 9]) == {0, 1, 2, 3, 4, 5, 6, 9}
    assert filling([0, 3]) == {0, 1, 2, 3}  # a single text is decoded twice


def test_the_groups_are_the_misses_of_a_run(folder, file, ids):
    whole, _ = opened(folder, file)
    model, _ = opened(folder, file, smallest(whole, 48), policy="lru")
    store = store_of(model)
    with asked_planes(store) as asked, torch.no_grad(), operating_point(model, point=at(0.25)):
        for i in range(ids.shape[1]):
            model(input_ids=ids[:, i : i + 1], use_cache=False)
    lru = Eviction(cache_policies.get("lru"), group=store.group)
    misses = replayed(asked.groups, store.space, store.slots, lru)
    assert int(misses.lost.sum()) == store.cache.counts.misses > 0 and asked.prompts == []
    assert misses.hit_rate == store.cache.counts.hit_rate
    late = replayed(asked.groups, store.space, store.slots, lru, uncounted=range(3))
    assert np.array_equal(late.lost, misses.lost[3:]) and late.hit_rate > misses.hit_rate


def test_a_prompt_brings_in_what_its_steps_want(folder, file, ids):
    """The replay of what a store with a prompt was asked for has the misses of its steps alone."""
    whole, _ = opened(folder, file)
    model, _ = opened(folder, file, smallest(whole, 60), policy="lru")
    store, past = store_of(model), None
    with asked_planes(store) as asked, torch.no_grad(), operating_point(model, point=at(0.25)):
        for part in (ids[:, :16], *ids[:, 16:24].split(1, 1)):
            past = model(input_ids=part, past_key_values=past, use_cache=True).past_key_values
            if part.shape[1] > 1:
                before = store.cache.counts.misses
    assert asked.prompts == [0] and len(asked.slots) == 8 * 2
    lru = Eviction(cache_policies.get("lru"), group=store.group)
    found = replayed(asked.groups, store.space, store.slots, lru, uncounted=asked.prompts)
    without = [replace(group, step=group.step - 1) for group in asked.groups if group.step]
    alone = replayed(without, store.space, store.slots, lru)
    own = store.cache.counts.misses - before
    assert abs(int(found.lost.sum()) - own) <= 2  # a prompt in pieces leaves others behind than one at once
    assert int(found.lost.sum()) < int(alone.lost.sum())
    assert measure_plane_prices(store).seconds[-1] > 0


@pytest.mark.parametrize("slots", [2, 9, 40, 1000])
@torch.no_grad()
def test_widths_per_slot_are_those_of_memory_at_every_size(folder, file, ids, slots):
    model, _ = load(folder, torch.float32)
    whole, _ = opened(folder, file)
    stored, _ = opened(folder, file, smallest(whole, slots))
    assert store_of(stored).slots == min(slots, 2 * 6 * 8)
    for budget in (0.12, 0.25, 0.4):
        want, found = (logits(m, ids, point=at(budget)) for m in (model, stored))
        torch.testing.assert_close(found, want, **CLOSE)
        again, bits = logits(stored, ids, point=at(budget)), logits(whole, ids, point=at(budget))
        assert torch.equal(again, found)  # whatever was resident
        one = ids[:, :1]
        assert torch.equal(logits(stored, one, point=at(budget)), logits(stored, one, point=at(budget)))
        torch.testing.assert_close(bits, found, **CLOSE)  # activations are rounded again, never other slots


@torch.no_grad()
def test_what_knows_no_bits_reads_all_of_them(folder, file, ids):
    model, _ = load(folder, torch.float32, wide=True)
    stored, _ = opened(folder, file)
    eight = OperatingPoint(weights=QuantizeChange(Nested(), 8.0, 32).part())
    torch.testing.assert_close(logits(stored, ids), logits(model, ids, point=eight), **CLOSE)
    half = replace(FULL, slots=SlotRule(rule="product", budget=0.5))  # of the slots, whatever they weigh
    both = replace(half, weights=eight.weights)
    torch.testing.assert_close(logits(stored, ids, point=half), logits(model, ids, point=both), **CLOSE)
    rows = ids.repeat(2, 1)
    which = torch.arange(2).repeat_interleave(ids.shape[1])
    with operating_point(stored, point=[at(0.2), FULL], which=which), torch.no_grad():
        mixed = stored(input_ids=rows).logits
    torch.testing.assert_close(mixed[:1], logits(stored, ids, point=at(0.2)), **CLOSE)
    torch.testing.assert_close(mixed[1:], logits(stored, ids), **CLOSE)


@torch.no_grad()
def test_bits_of_each_expert_say_which_planes_are_read(folder, file, ids):
    """EdgeMoE's choice as a point: the model in memory with its experts at those widths, and no lower plane of narrow ones."""
    model, _ = load(folder, torch.float32, wide=True)
    stored, whole = opened(folder, file)[0], opened(folder, file)[0]
    store = store_of(stored)
    bits = ((4.0, 8.0, 4.0, 8.0, 3.0, 8.0), (8.0, 4.0, 4.0, 4.0, 8.0, 2.0))
    point = OperatingPoint(weights=QuantizeChange(Nested(most=8), bits, 32).part())
    torch.testing.assert_close(logits(stored, ids, point=point), logits(model, ids, point=point), **CLOSE)
    for layer in range(2):
        both = store.resident(layer).reshape(6, -1, 2)
        narrow = torch.tensor(bits[layer]) <= 4
        assert not both[narrow.numpy(), :, 1].any() and both[~narrow.numpy()].any()
        assert (both[~narrow.numpy()][:, :, 0] == both[~narrow.numpy()][:, :, 1]).all()
    torch.testing.assert_close(logits(stored, ids), logits(whole, ids))  # and afterwards they are read as before
    ahead, _ = opened(folder, file, ahead=6)
    for i in range(4):  # nor is one of them read ahead
        assert torch.equal(logits(ahead, ids[:, i : i + 1], point=point), logits(stored, ids[:, i : i + 1], point=point))
    store_of(ahead).settle()
    assert sum(pool.counts.prefetched for pool in store_of(ahead).cache.pools) > 0
    for layer in range(2):
        assert not store_of(ahead).resident(layer).reshape(6, -1, 2)[np.array(bits[layer]) <= 4, :, 1].any()
    half = replace(point, slots=at(0.25).slots)
    with pytest.raises(UsageError, match="have their own bits"):
        logits(stored, ids, point=half)


@torch.no_grad()
def test_a_plane_is_read_for_slots_that_ask_for_it_alone(folder, file, ids):
    """Slots of four bits read no lower plane; more of them later read only what is new."""
    stored, _ = opened(folder, file)
    store = store_of(stored)
    narrow = at(0.2, errors=((0.15, 0.04, 0.0, 1.0, 1.0),) * 2)  # more than four bits gain nothing
    logits(stored, ids, point=narrow)
    upper = {layer: store.resident(layer).reshape(-1, 2).copy() for layer in range(2)}
    assert all(found[:, 0].any() and not found[:, 1].any() for found in upper.values())
    read = store.times.bytes
    assert read == sum(int(found.sum()) for found in upper.values()) * store.pack.layout.bytes
    logits(stored, ids, point=at(0.95, errors=((0.9, 0.8, 0.7, 0.6, 0.0),) * 2))
    now = {layer: store.resident(layer).reshape(-1, 2) for layer in range(2)}
    fresh = sum(int((now[layer] & ~upper[layer]).sum()) for layer in range(2))
    assert store.times.bytes - read == fresh * store.pack.layout.bytes and any(now[layer][:, 1].any() for layer in range(2))


@torch.no_grad()
def test_reading_ahead_changes_nothing_but_time(folder, file, ids):
    plain, ahead = opened(folder, file)[0], opened(folder, file, ahead=4)[0]
    with torch.no_grad():
        for model in (plain, ahead):
            model.past = None
        for i in range(6):
            found = []
            for model in (plain, ahead):
                with operating_point(model, point=at(0.25)):
                    out = model(input_ids=ids[:, i : i + 1], past_key_values=model.past, use_cache=True)
                model.past = out.past_key_values
                found.append(out.logits)
            assert torch.equal(*found)
    counts = [pool.counts for pool in store_of(ahead).cache.pools]
    assert sum(c.prefetched for c in counts) > 0


@torch.no_grad()
def test_a_floor_takes_planes_that_are_there_and_reads_the_others_less(folder, file, ids):
    point, one = at(0.5), ids[:, :1]
    cold, _ = opened(folder, file, misses=Misses(floor=0.05))
    low = logits(cold, one, point=point)
    read = store_of(cold).times.bytes
    plain, _ = opened(folder, file)
    logits(plain, one, point=point)
    assert read < store_of(plain).times.bytes
    warm, _ = opened(folder, file)
    logits(warm, ids)  # everything that is asked for arrives
    warm._moe_prism.misses = Misses(floor=0.05)
    torch.testing.assert_close(logits(warm, one, point=point), logits(plain, one, point=point), rtol=1e-5, atol=1e-5)
    assert not torch.equal(low, logits(plain, one, point=point))


def test_what_records_do_not_hold_is_refused(folder, file, tmp_path):
    stored, _ = opened(folder, file)
    with (
        pytest.raises(UsageError, match="the records have 2 to 8 in groups of 32"),
        operating_point(stored, point=at(0.2, group=64)),
    ):
        pass
    for codec, bits, group in (
        (Nested(), 8.0, 64),
        (Rtn(), 4.0, 32),
        (Nested(base=4), 8.0, 32),
        (Nested(), 4.0, 32),
        (Nested(most=6), 4.0, 32),
    ):
        with (
            pytest.raises(UsageError, match="the records have nested planes of 2 to 8 bits in groups of 32"),
            operating_point(stored, point=OperatingPoint(weights=QuantizeChange(codec, bits, group).part())),
        ):
            pass
    with pytest.raises(UsageError, match="no int8 form"):
        opened(folder, file, misses=Misses(0.1, low=0.5))
    with pytest.raises(DoesNotFit, match="hold no sub-expert"):
        opened(folder, file, smallest(stored, 1))
    plain, _ = opened(folder, tmp_path / "plain")
    with pytest.raises(UsageError, match="hold no slots of several widths"), operating_point(plain, point=at(0.2)):
        pass
    manifest = read_manifest(folder)
    for storage, why in ((PlaneStorage(group=48), "no whole groups"), (PlaneStorage(bits=4, group=32), "two planes")):
        with pytest.raises(UsageError, match=why):
            write_pack(folder, tmp_path / "other", manifest, planes=storage)


def test_a_damaged_plane_is_an_error_that_names_it(folder, file, ids):
    stored, _ = opened(folder, file, reader=flaky(Faults(failing=1.0)))
    with pytest.raises(StoreError, match="cannot be read"):
        logits(stored, ids, point=at(0.2))
    store = store_of(stored)
    assert not any(store.resident(layer).any() for layer in range(2))
    text = file.read_bytes()
    where = text.index(b'"group": 32')
    damaged = file.with_name("damaged.pack")
    damaged.write_bytes(text[:where] + b'"group": 48' + text[where + 11 :])
    with pytest.raises(CorruptError, match="damaged header"):
        open_pack(damaged, read_manifest(folder))
