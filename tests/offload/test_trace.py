"""Recording, the file, the command; the trace shipped with the package."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_prism import cli
from moe_prism.artefact.load import load
from moe_prism.elastic import operating_point
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.trace import TraceOptions, compare_policies, miss_sizes, record_trace, write_miss_curves
from moe_prism.model import find_layers, load_model
from moe_prism.offload import load_trace
from moe_prism.offload.record import TraceRecorder, record, router_weight
from moe_prism.offload.replay import groups, interleave
from moe_prism.offload.trace import DECODE, PREFILL, check

from .common import make, sticky, uniform

IDS = torch.arange(40).view(2, 20) % 50 + 5


@pytest.fixture
def trace():
    return make(uniform(12, 2, 8, 3), experts=8)


def test_records_what_the_experts_were_asked_for(tiny_source):
    model = load_model(tiny_source, torch.float32)
    layers, seen = find_layers(model), []
    for layer in layers:
        layer.install(lambda x, i, w, layer=layer: (seen.append((layer.index, x, i, w)), layer.stock(x, i, w))[1])
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    for layer in layers:
        layer.uninstall()
    trace = record(TraceRecorder(model, inputs=True), [("evaluation", IDS)], prompt=8)
    check(trace)
    for number, x, index, weight in seen:
        assert np.array_equal(trace.expert_ids[:, number], index)
        np.testing.assert_allclose(trace.weights[:, number], weight, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(trace.inputs[:, number], x, rtol=1e-3, atol=1e-3)
    top = np.sort((-trace.logits.astype(np.float32)).argsort(-1, kind="stable")[..., : trace.k], -1)
    assert (top == np.sort(trace.expert_ids, -1)).mean() > 0.98  # float16 may tie
    assert trace.n_sub == 1 and trace.kept is None
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain)  # nothing stays installed


def test_records_kept_slots_of_an_operating_point(elastic_tiny):
    model, _ = load(elastic_tiny)
    before = [layer.parts.layer for layer in model._moe_prism.layers]
    with operating_point(model, 0.5) as elastic, torch.no_grad():
        with elastic.count():
            expected = model(input_ids=IDS).logits
        kept = [layer.counter.kept for layer in elastic.layers]
        trace = record(TraceRecorder(model, values=True), [("evaluation", IDS)], prompt=8)
        assert torch.equal(model(input_ids=IDS).logits, expected)
    check(trace)
    assert trace.slots().sum(0).tolist() == kept
    assert trace.values.shape == (40, len(before), trace.k, trace.n_sub)
    keys = [len(g.keys) for g in groups(trace.decode(), trace.sub_space)]
    assert sum(keys) == trace.decode().slots().sum()


def test_full_budget_keeps_every_slot(elastic_tiny):
    model, _ = load(elastic_tiny)
    trace = record(TraceRecorder(model), [("calibration", IDS)], prompt=4)
    assert (trace.slots() == trace.k * trace.n_sub).all()


def test_values_need_an_elastic_model(tiny_source):
    with pytest.raises(UsageError, match="elastic"):
        TraceRecorder(load_model(tiny_source), values=True)


def test_router_is_found_beside_the_experts(tiny_source):
    model = load_model(tiny_source)
    layer = find_layers(model)[0]
    assert router_weight(model, layer) is model.model.layers[0].mlp.gate.weight.detach() or torch.equal(
        router_weight(model, layer), model.model.layers[0].mlp.gate.weight
    )


def test_steps_prefill_together_and_decode_one_by_one(tiny_source):
    trace = record(TraceRecorder(load_model(tiny_source)), [("calibration", IDS[:1]), ("evaluation", IDS[1:])], prompt=8)
    assert trace.step.tolist() == [0] * 8 + list(range(1, 13)) + [13] * 8 + list(range(14, 26))
    assert trace.phase.tolist() == ([PREFILL] * 8 + [DECODE] * 12) * 2
    assert trace.side.tolist() == [0] * 20 + [1] * 20
    assert trace.token.tolist() == IDS.flatten().tolist()
    fresh = [g.step for g in groups(trace, trace.space) if g.fresh and g.layer == 0]
    assert fresh == [0, 13]


def test_groups_are_the_distinct_keys_heaviest_first(trace):
    weights = np.tile(np.array([0.2, 0.5, 0.3], np.float32), (12, 2, 1))
    both = replace(trace, weights=weights.astype(np.float16), step=np.arange(12, dtype=np.int32) // 2)
    found = list(groups(both, both.space))
    assert len(found) == 6 * 2
    for group in found:
        rows = both.expert_ids[2 * group.step : 2 * group.step + 2, group.layer]
        best = {}
        for ids in rows:
            for e, w in zip(ids.tolist(), (0.2, 0.5, 0.3), strict=True):
                best[e + 8 * group.layer] = max(best.get(e + 8 * group.layer, 0), w)
        assert sorted(group.keys) == sorted(best)
        assert group.weights == sorted(group.weights, reverse=True)
        np.testing.assert_allclose(group.weights, [best[k] for k in group.keys], rtol=1e-3)


def test_unused_slots_are_no_keys():
    ids = uniform(6, 2, 8, 3)
    ids[2, 1, 1:] = -1
    ids[4, 0] = -1
    trace = make(ids, experts=8)
    check(trace)
    sizes = [len(g.keys) for g in groups(trace, trace.space)]
    assert sizes == [3, 3, 3, 3, 3, 1, 3, 3, 0, 3, 3, 3]


def test_interleave_keeps_rows_and_order_within_requests():
    trace = make(uniform(20, 2, 8, 2), experts=8, request=np.repeat([0, 1, 2, 3], 5))
    both = interleave(trace, 2)
    assert sorted(zip(both.request, both.position, strict=True)) == sorted(zip(trace.request, trace.position, strict=True))
    assert both.step.tolist() == [s for s in range(5) for _ in range(2)] + [5 + s for s in range(5) for _ in range(2)]
    assert np.array_equal(interleave(trace, 1).expert_ids, trace.expert_ids)
    with pytest.raises(UsageError):
        interleave(trace, 0)


def test_file_round_trip_is_exact_and_deterministic(trace, tmp_path):
    paths = tmp_path / "a.npz", tmp_path / "b.npz"
    for path in paths:
        trace.save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    again = load_trace(paths[0])
    assert again.header == trace.header
    assert np.array_equal(again.expert_ids, trace.expert_ids) and again.kept is None


BAD = {
    "an expert out of range": lambda t: {"expert_ids": t.expert_ids + 6},
    "an expert twice": lambda t: {"expert_ids": np.zeros_like(t.expert_ids)},
    "steps backwards": lambda t: {"step": t.step[::-1].copy()},
    "a shape": lambda t: {"weights": t.weights[:, :1]},
    "a type": lambda t: {"request": t.request.astype(np.float32)},
    "not finite": lambda t: {"weights": np.full_like(t.weights, np.nan)},
    "a phase": lambda t: {"phase": t.phase + 5},
    "a side": lambda t: {"side": t.side - 1},
    "bits": lambda t: {"kept": np.full(t.expert_ids.shape, 2, np.uint8)},
    "a header": lambda t: {"header": {**t.header, "experts": "8"}},
    "no tokens": lambda t: {n: getattr(t, n)[:0] for n in ("step", "expert_ids", "weights", "request", "position")},
}


@pytest.mark.parametrize("what", BAD)
def test_damage_is_one_line(trace, tmp_path, what):
    path = tmp_path / "bad.npz"
    replace(trace, **BAD[what](trace)).save(path)
    with pytest.raises(CorruptError) as error:
        load_trace(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 torn"])
def test_no_trace_at_all(tmp_path, content):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(CorruptError):
        load_trace(path)
    np.savez(path, header=np.frombuffer(b'{"format": 99}', np.uint8))
    with pytest.raises(CorruptError, match="format"):
        load_trace(path)
    with pytest.raises(UsageError, match="does not exist"):
        load_trace(tmp_path / "missing.npz")


@pytest.mark.parametrize("start", range(8))
def test_flipped_bytes_are_one_line_or_harmless(trace, tmp_path, start):
    path = tmp_path / "x.npz"
    trace.save(path)
    whole = path.read_bytes()
    for position in range(start * 11, len(whole), 89):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            load_trace(path)
        except CorruptError as error:
            assert "\n" not in str(error)


def test_missing_and_unknown_arrays_are_named(trace, tmp_path):
    path = tmp_path / "x.npz"
    trace.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{k: v for k, v in arrays.items() if k != "step"})
    with pytest.raises(CorruptError, match="'step'"):
        load_trace(path)
    np.savez(path, **arrays, more=np.zeros(1))
    with pytest.raises(CorruptError, match="'more'"):
        load_trace(path)


def test_a_side_that_was_not_recorded(trace):
    with pytest.raises(UsageError, match="evaluation"):
        replace(trace, side=np.zeros(12, np.int8)).part("evaluation")
    with pytest.raises(UsageError, match="no side"):
        trace.part("training")


def test_shipped_trace():
    trace = load_trace("nano")
    assert (trace.layers, trace.experts, trace.k, trace.n_sub) == (6, 32, 4, 4)
    assert len(trace.part("calibration")) == len(trace.part("evaluation")) == 3072
    assert {int(p) for p in trace.phase} == {PREFILL, DECODE}
    assert 7 < trace.slots().mean() < 9
    assert not set(trace.part("calibration").request) & set(trace.part("evaluation").request)


def test_command(tiny_source, text_file, tmp_path, capsys):
    out = tmp_path / "t.npz"
    command = ["trace", str(tiny_source), "-o", str(out), "--text", str(text_file), "--tokens", "256", "--length", "32"]
    assert cli.main([*command, "--prompt", "8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == 256 == len(load_trace(out))
    assert cli.main([*command, "--prompt", "8"]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["inspect", str(tiny_source), "--routing", "--trace", str(out)]) == 0
    assert "SRP" in capsys.readouterr().out
    assert cli.main([*command, "--force", "--prompt", "32"]) == 2
    assert cli.main([*command, "--force", "--budget", "0.5", "--prompt", "8"]) == 2
    assert "not elastic" in capsys.readouterr().err
    assert cli.main(["inspect", str(tiny_source), "--trace", str(out)]) == 2
    assert cli.main(["inspect", str(tiny_source), "--routing", "--report", str(out)]) == 2


def test_options_are_checked(tiny_source):
    for bad in (TraceOptions(tokens=0), TraceOptions(length=4), TraceOptions(prompt=-1), TraceOptions(length=16, prompt=16)):
        with pytest.raises(UsageError):
            record_trace(tiny_source, None, bad)


def test_miss_curves_page(tmp_path):
    ids = sticky(60, 2, 8, 2, seed=3)
    trace = make(
        ids, experts=8, n_sub=2, kept=np.where(np.arange(60)[:, None, None] % 2, 3, 1).astype(np.uint8) + 0 * ids.astype("u1")
    )
    check(trace)
    rows = compare_policies(trace, [2, 4], policies=["lru", "lfu"])
    assert [r["policy"] for r in rows] == ["belady", "lru", "lfu"] * 2
    assert all(r["of_belady"] <= 1 for r in rows)
    trace.save(tmp_path / "t.npz")
    write_miss_curves(tmp_path / "t.npz", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 6 and "belady" in page and "http" not in page.replace("http://www.w3.org", "")
    assert miss_sizes(4, 10) == [4, 6, 8, 10]
