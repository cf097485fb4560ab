"""The time of a frontier's points: who is timed, in which form, and what a process that fails says. Never how long anything takes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from moe_prism.artefact.load import load
from moe_prism.artefact.open import open_model
from moe_prism.errors import PrismError, UsageError
from moe_prism.frontier import DecodeTime, Frontier
from moe_prism.jobs import time_points
from moe_prism.jobs.frontier import measure_frontier
from moe_prism.jobs.time_points import Timing, time_frontier
from moe_prism.options.frontier import FrontierOptions


@pytest.fixture(scope="module")
def measured(elastic_tiny, text_file) -> Frontier:
    names = ("threshold", "prune:soft-count")
    options = FrontierOptions(text=str(text_file), methods=names, tokens=64, length=32, calibration_tokens=64, per_method=2)
    return measure_frontier(elastic_tiny, options)


@pytest.fixture
def here(monkeypatch):
    """The work of the process in this one, in few turns."""
    monkeypatch.setattr(time_points, "_ask", time_points._run)
    monkeypatch.setattr(time_points, "PROMPT", 8)
    monkeypatch.setattr(time_points, "MOST_TURNS", time_points.LEAST_TURNS)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_point_but_changed_weights_has_a_time(measured, elastic_tiny, text_file, here, batch):
    found = time_frontier(elastic_tiny, measured, Timing(batch, str(text_file)))
    assert [replace(p, time=None) for p in found.points] == list(measured.points)
    for point in (*found.points, *found.baseline_topk):
        if point.point.weights is not None:
            assert point.time is None
            continue
        time = point.time
        assert (time.batch, time.turns) == (batch, time_points.LEAST_TURNS)
        assert 0 < time.low <= time.ms_per_token <= time.high and time.of_stock > 0
    facts = found.provenance["time"]
    assert DecodeTime(**facts["stock"]).of_stock == 1 and facts["device"].startswith("CPU, ")
    assert Frontier.from_json(found.to_json()) == found


def test_the_model_is_as_before_and_every_turn_visits_every_point(elastic_tiny, text_file, here, monkeypatch):
    opened, seen = open_model(elastic_tiny), []
    ids = torch.arange(4, 20)[None]
    before = opened.model(input_ids=ids).logits

    def step(model, rows, cache):
        seen.append((rows.shape, cache.get_seq_length()))
        model(input_ids=rows, past_key_values=cache, use_cache=True)
        return float(len(seen))

    monkeypatch.setattr(time_points, "mean_step", step)
    switches = [time_points._stock(opened.elastic, n) for n in (1, 2)] * 4
    turns = list(time_points._turns(opened, switches, Timing(2, str(text_file)), lambda done, total: None))
    assert len(turns) == time_points.LEAST_TURNS and all(len(set(turn)) == len(switches) for turn in turns)
    assert {shape for shape, _ in seen} == {(2, 1), (2, time_points.STEPS - 1)}
    assert max(past for _, past in seen) < time_points.PROMPT + time_points.STEPS * len(switches)
    assert torch.equal(opened.model(input_ids=ids).logits, before)


def test_stock_with_fewer_experts_is_a_model_of_fewer(elastic_tiny):
    opened, (plain, _) = open_model(elastic_tiny), load(elastic_tiny)
    plain._moe_prism.detach()
    for module in plain.modules():
        if hasattr(module, "top_k"):
            module.top_k = 1
    ids = torch.arange(4, 36).view(2, 16)
    with time_points._stock(opened.elastic, 1)():
        found = opened.model(input_ids=ids).logits
    assert torch.allclose(found, plain(input_ids=ids).logits, atol=1e-5)


def test_too_large_a_batch(measured, elastic_tiny, text_file, here):
    with pytest.raises(UsageError, match="--time-batch asks for 100000"):
        time_frontier(elastic_tiny, measured, Timing(100_000, str(text_file)))


@pytest.mark.parametrize(
    ("code", "how"), [("import sys; sys.exit(7)", "exit code 7"), ("import os; os.kill(os.getpid(), 9)", "signal 9")]
)
def test_a_process_that_dies_is_told_in_one_line(measured, elastic_tiny, tmp_path, monkeypatch, code, how):
    (tmp_path / "dies.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(time_points, "__name__", "dies")
    with pytest.raises(PrismError, match=f"{how}; see whether memory ran out"):
        time_frontier(elastic_tiny, measured, Timing())


def test_what_the_process_refuses_is_refused_here(measured, elastic_tiny, tmp_path, monkeypatch):
    code = 'import sys; sys.stdin.read(); print(\'{"done": 1, "total": 2}\'); print(\'{"error": "UsageError", "words": ["a", "b"]}\')'
    (tmp_path / "refuses.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(time_points, "__name__", "refuses")
    with pytest.raises(UsageError, match="a; b"):
        time_frontier(elastic_tiny, measured, Timing())


@pytest.mark.slow
def test_the_process_itself(measured, elastic_tiny, text_file):
    found = time_frontier(elastic_tiny, measured, Timing(2, str(text_file), seconds=0.0))
    assert all((p.time is None) == (p.point.weights is not None) for p in found.points)
