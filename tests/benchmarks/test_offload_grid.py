"""benchmarks/offload_grid.py runs on a tiny model and chooses by forecasts alone."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from moe_prism.jobs.refactor import RefactorOptions, refactor
from tests.tiny_sources import save_tiny


@pytest.fixture
def grid(script):
    return script("offload_grid")


@pytest.fixture
def wide(shared, tmp_path, tiny_calibration):
    """Of whole groups of 32 weights."""
    source = tmp_path / "m"
    save_tiny("olmoe", source, hidden_size=64, intermediate_size=128, num_experts=6)
    options = RefactorOptions(calibration=tiny_calibration, gates=0, n_sub=4)
    return shared("elastic-wide-0", lambda out: refactor(source, out, options))


def arguments(work, **more):
    own = {"link": 1000.0, "links": [1000.0], "shares": [0.5], "tokens": 4, "rounds": 1, "budget": 0.6, "bits": 0.3, "group": 32}
    return Namespace(**{**own, "text": "stdlib", "large": False, "low": False, "work": work, **more})


@pytest.mark.slow
def test_a_cell_has_the_fastest_by_its_forecast(grid, wide, tmp_path, monkeypatch):
    plane_tiles = pytest.importorskip("moe_prism.kernels.plane_tiles")
    if not plane_tiles.AVAILABLE:
        pytest.skip("this processor has no products of bytes")
    plain = grid.fitted
    monkeypatch.setattr(
        grid, "fitted", lambda folder, group, layers: plain(folder, group, 2)
    )  # measured on text, in the benchmark
    asked = arguments(tmp_path)
    bench = grid.Bench.of(wide, tmp_path, asked)
    rows = grid.cell(bench, Namespace(**vars(asked), share=0.5))
    assert [row["config"] for row in rows][::2] == ["lru", "bits 0.3"] and rows[1]["config"] in ("budget 1", "budget 0.6")
    assert rows[0]["ratio"] == 1 and rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    fastest = min(rows, key=lambda row: row["forecast_ms"] * (1 if row["config"] == "lru" else 1 + grid.MARGIN))
    assert [row["chosen"] for row in rows] == [row is fastest for row in rows]
    assert all(row["ms_per_token"] > 0 and row["forecast_ms"] > 0 for row in rows) and json.dumps(rows)
