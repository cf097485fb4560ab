"""A server that records what its requests route to, and shows what its store does."""

from __future__ import annotations

import time

import httpx2
import numpy as np
import pytest

from moe_prism.errors import UsageError
from moe_prism.jobs.fit_offload import fit_offload
from moe_prism.offload.trace import DECODE, PREFILL, load_trace
from moe_prism.options.fit import FitOptions
from moe_prism.options.serve import ServeOptions
from moe_prism.serve.engine.routing_log import RoutingLog
from moe_prism.serve.server import serve_model
from moe_prism.store import StoreOptions
from moe_prism.store.choose_misses import Misses
from tests.serve.house import open_house
from tests.tiers import by_night

PROMPTS = ["import os", "def main(", "class A:", "x = [1, 2"]


def ask(house, prompt, count=6, quality=1.0):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": count, "temperature": 0, "quality": quality, "ignore_eos": True}
    answer = httpx2.post(f"{house.url}/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_server_writes_what_it_routed_and_the_fit_reads_it(tiny_levels, tmp_path):
    out = tmp_path / "trace.npz"
    with open_house(tiny_levels, trace_out=out) as house:
        ask(house, "begins")
        for prompt in PROMPTS:
            ask(house, prompt)
        ask(house, "cheap", quality=0.8)
    trace = load_trace(out)
    assert set(np.unique(trace.token)) == {-1} and trace.header["token_ids"] is False
    assert set(np.unique(trace.phase)) == {PREFILL, DECODE} and len(np.unique(trace.request)) >= len(PROMPTS)
    for request in np.unique(trace.request):
        rows = trace.rows(trace.request == request)
        assert (np.diff(rows.position) == 1).all() and (rows.step[rows.phase == DECODE] > rows.step[0]).all()
    assert trace.slots().min() < trace.slots().max()  # the cheap one kept fewer
    assert set(np.unique(trace.side)) == {0, 1}
    found = fit_offload(trace, tmp_path / "s.json", FitOptions(share=0.5, policy=["lru", "lfu"], predictor=["frequency"]))
    assert len(found.held_out) >= 3


def test_a_request_under_way_when_it_begins_is_left_out(tiny_levels, tmp_path, monkeypatch):
    note, missed = RoutingLog.note, iter(range(3))
    monkeypatch.setattr(RoutingLog, "note", lambda log, step: note(log, step) if next(missed, None) is None else None)
    with open_house(tiny_levels, trace_out=tmp_path / "trace.npz") as house:
        ask(house, "begins")
        ask(house, PROMPTS[0])
    trace = load_trace(tmp_path / "trace.npz")
    assert len(np.unique(trace.request)) == 1 and trace.phase[0] == PREFILL


def test_it_stops_at_its_bound_and_keeps_ids_only_where_asked(tiny_levels, tmp_path):
    out = tmp_path / "trace.npz"
    with open_house(tiny_levels, trace_out=out, trace_tokens=20, trace_ids=True) as house:
        ask(house, "begins")
        for prompt in PROMPTS * 2:
            ask(house, prompt)
        until = time.monotonic() + 10
        while not out.exists() and time.monotonic() < until:
            time.sleep(0.02)
        trace = load_trace(out)  # while the server runs
        assert len(trace) == 20 and trace.token.min() >= 0
        before = ask(house, PROMPTS[0])["choices"][0]["text"]
    with open_house(tiny_levels) as house:
        assert ask(house, PROMPTS[0])["choices"][0]["text"] == before


def test_what_is_refused(tiny_levels, tmp_path):
    with pytest.raises(UsageError, match="belong to --trace-out"):
        ServeOptions(trace_ids=True).check()
    there = tmp_path / "there.npz"
    there.touch()
    with pytest.raises(UsageError, match="exists"):
        serve_model(tiny_levels, ServeOptions(trace_out=there, port=0))
    with pytest.raises(UsageError, match="cannot write"):
        serve_model(tiny_levels, ServeOptions(trace_out=tmp_path / "none" / "t.npz", port=0))


@pytest.mark.parametrize("process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_live_figures_of_a_store(tiny_levels, tmp_path, process):
    store = StoreOptions(120_000, tmp_path / "pack", misses=Misses())
    config = {"engine": {"process": process, "requests": 4, "step_tokens": 64, "cache_tokens": 2048, "page": 16}}
    with open_house(tiny_levels, config, store=store) as house:
        for prompt in PROMPTS:
            ask(house, prompt, 12)
        time.sleep(0.4)  # the engine's process says how things stand four times a second
        text = httpx2.get(f"{house.root}/metrics").text
        values = {
            line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith("moe_prism:expert_")
        }
        assert values["moe_prism:expert_store_tokens_total"] >= 4 * 12
        assert 0 < values["moe_prism:expert_records_missed_total"] <= values["moe_prism:expert_records_requested_total"]
        assert values["moe_prism:expert_bytes_read_total"] > 0 and values["moe_prism:expert_stall_seconds_total"] > 0
        shown = httpx2.get(f"{house.root}/status.json").json()["experts"]
        assert shown["miss_rate"] == pytest.approx(
            values["moe_prism:expert_records_missed_total"] / values["moe_prism:expert_records_requested_total"], rel=0.2
        )
        assert shown["records_per_step"] > 1 and shown["bytes_per_token"] > 0


@pytest.mark.parametrize("predictor", by_night(("token", "path"), "token"))
def test_a_server_reads_ahead_by_the_ids_of_its_requests(tiny_levels, tmp_path, predictor):
    """Its cache of keys and values holds other requests at every step, and has no length to go by."""
    trace, path = tmp_path / "trace.npz", tmp_path / "s.json"
    with open_house(tiny_levels, trace_out=trace, trace_ids=True) as house:
        wanted = [ask(house, prompt, 12)["choices"][0]["text"] for prompt in PROMPTS][1:]
    fit_offload(load_trace(trace), path, FitOptions(share=0.5, policy=["lru"], predictor=[predictor]))
    store = StoreOptions(120_000, tmp_path / "pack", fitted=path, predictor=predictor, ahead=3)
    with open_house(tiny_levels, store=store) as house:
        assert [ask(house, prompt, 12)["choices"][0]["text"] for prompt in PROMPTS][1:] == wanted
        assert house.built.service.engine.model._moe_prism.store.cache.counts.prefetched > 0


def test_experts_in_memory_have_no_such_figures(house):
    ask(house, "x")
    assert "moe_prism:expert_" not in httpx2.get(f"{house.root}/metrics").text
    assert httpx2.get(f"{house.root}/status.json").json()["experts"] is None
