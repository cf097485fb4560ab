"""HOBBIT's thresholds from a fit: within the loss that was asked for, measured on held-out text, and what a store then does."""

from __future__ import annotations

import json

import pytest

from moe_prism.cli import main
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.fit_offload import fit_offload
from moe_prism.jobs.fit_shares import SHARES, SharesRow, fastest
from moe_prism.offload.record import TraceRecorder, record
from moe_prism.offload.settings import read_settings
from moe_prism.options.fit import FitOptions
from moe_prism.store.choose_misses import Misses
from tests.store.common import PROMPT, opened, smallest


def test_the_fastest_within_the_loss_is_chosen_and_no_loss_is_always_possible():
    rows = [SharesRow(1.0, 1.0, 0.0, 9, 9.0), SharesRow(0.6, 1.0, 0.01, 7, 7.0), SharesRow(0.4, 0.9, 0.1, 5, 5.0)]
    assert [fastest(rows, most) for most in (0.0, 0.05, 1.0)] == rows
    assert SHARES[0] == (1.0, 1.0)


def test_thresholds_are_fitted_written_and_followed(elastic_half, tmp_path, monkeypatch):
    """Records of the tiny model are as large in int8, since they are padded: only what is skipped saves anything."""
    rates = (0.0, 0.3, 1.0)
    less = {
        "SHARES": ((1.0, 1.0), (0.4, 0.9), (0.0, 0.0)),
        "RATES": rates,
        "LENGTH": 48,
        "TEXTS": 2,
        "PROMPT": 16,
        "LONG_PROMPT": 40,
    }
    for name, value in less.items():
        monkeypatch.setattr(f"moe_prism.jobs.fit_shares.{name}", value)
    whole, tokenizer = opened(elastic_half, tmp_path / "p")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, :24].reshape(4, 6)
    trace = record(TraceRecorder(whole), [("calibration", ids[:2]), ("evaluation", ids[2:])], prompt=1)
    path = tmp_path / "settings.json"
    asked = {"share": 0.2, "policy": ["lru"], "predictor": ["frequency"], "folder": elastic_half}
    exact = fit_offload(trace, path, FitOptions(max_kl=0.0, **asked))
    assert exact.loss is not None and exact.loss.shares.t1 == 1 and exact.loss.shares.kl == pytest.approx(0, abs=1e-6)
    found = fit_offload(trace, path, FitOptions(max_kl=100.0, record_ms=100.0, **asked), force=True)
    assert exact.loss.rate.rate == 0 and exact.loss.rate.kl == pytest.approx(0, abs=1e-6)
    assert found.loss is not None and [row.rate for row in found.loss.rates_tried] == list(rates)
    assert found.loss.rates_tried[-1].kl > 0  # all that is missing came in int8
    assert found.to_json()["rates_tried"][0]["rate"] == 0
    assert len(found.loss.shares_tried) == 3 and not (elastic_half / "experts.pack").exists()
    best = min(found.loss.shares_tried, key=lambda row: row.ms_per_token)
    own = read_settings(path)
    assert own.shares == (best.t1, best.t2) == (0, 0)
    assert found.loss.shares.kl > 0 and found.loss.shares.kb_per_token < found.loss.shares_tried[0].kb_per_token
    memory, file = smallest(whole, own.slots), tmp_path / "low"
    stored, _ = opened(elastic_half, file, memory, fitted=path, ahead=0)
    assert stored._moe_prism.misses == Misses(shares=own.shares, prompt_rate=own.prompt_rate)
    other, _ = opened(elastic_half, file, memory, fitted=path, ahead=0, misses=Misses(shares=(1.0, 1.0)))
    assert other._moe_prism.misses == Misses(shares=(1.0, 1.0))  # what is asked for goes before the file
    form = json.loads(path.read_text())
    for wrong in ([0.9, 0.6], [0.5], [0.5, 2.0]):
        path.write_text(json.dumps({**form, "miss_shares": wrong}))
        with pytest.raises(CorruptError):
            read_settings(path)


def test_what_a_fit_of_thresholds_is_not(elastic_half, tmp_path, capsys):
    with pytest.raises(UsageError, match="belong together"):
        FitOptions(max_kl=0.1).check()
    generate = ["generate", str(elastic_half), "--prompt", "x", "--expert-memory", "1MB", "--expert-file", str(tmp_path / "p")]
    for wrong, reason in (("0.5", "not two numbers"), ("0.9,0.5", "no T1 <= T2")):
        assert main([*generate, "--miss-shares", wrong]) == 2
        assert reason in capsys.readouterr().err
    assert main([*generate[:4], "--miss-shares", "0.5,1"]) == 2
    assert "--miss-shares is of no use alone" in capsys.readouterr().err
