"""Layers whose experts do not fit in memory: every command that maps them gives the same bytes, and says how long it takes."""

from __future__ import annotations

import pytest

from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint import mapped
from moe_prism.jobs import expert_memory, needed_by_refactor, pilot
from moe_prism.jobs.calibrate import calibrate_model
from moe_prism.jobs.expert_memory import MAPPED
from moe_prism.jobs.job_times import SolvedRows
from moe_prism.jobs.pilot import typical
from moe_prism.jobs.refactor import RefactorOptions, refactor, refactor_shard
from moe_prism.jobs.rehearsal import rehearse
from tests.checkpoint import quantized
from tests.tiny_sources import digests, save_tiny


@pytest.fixture
def no_memory(monkeypatch):
    """A machine on which no layer fits. Returns the list of what was mapped."""
    monkeypatch.setattr(expert_memory, "free_memory", lambda: 0)
    monkeypatch.setattr(mapped, "TOGETHER", 3)
    made, make = [], mapped.mapped_tensor
    monkeypatch.setattr(mapped, "mapped_tensor", lambda *given: made.append(given) or make(*given))
    return made


def asked(text_file, **more):
    return CalibrateOptions(text=str(text_file), tokens=1024, length=32, reservoir=256, low_memory=True, **more)


@pytest.mark.parametrize("form", ["plain", pytest.param("mxfp4", marks=pytest.mark.slow)])
def test_experts_in_one_tensor_give_the_same_bytes(form, tmp_path, text_file, request):
    source = tmp_path / "plain"
    save_tiny("gpt_oss", source, hidden_size=64, intermediate_size=32)
    if form != "plain":
        quantized.quantize(source, source := tmp_path / "coded", form)
    options = RefactorOptions(calibration=asked(text_file), profile_tokens=128, profile_points=1)
    refactor(source, tmp_path / "memory", options)
    made = request.getfixturevalue("no_memory")
    assert rehearse(refactor, source, tmp_path / "disk", options).needed[MAPPED]
    refactor(source, tmp_path / "disk", options)
    assert digests(tmp_path / "disk") == digests(tmp_path / "memory") and made


def test_a_calibration_maps_what_does_not_fit(tiny_source, tmp_path, text_file, request):
    calibrate_model(tiny_source, tmp_path / "memory", asked(text_file))
    plain = rehearse(calibrate_model, tiny_source, tmp_path / "disk", asked(text_file))
    made = request.getfixturevalue("no_memory")
    needed = rehearse(calibrate_model, tiny_source, tmp_path / "disk", asked(text_file))
    assert needed.needed[MAPPED] and MAPPED not in plain.needed and needed.disk_bytes > plain.disk_bytes
    assert needed.needed["weights_bytes"] <= plain.needed["weights_bytes"]
    calibrate_model(tiny_source, tmp_path / "disk", asked(text_file))
    assert digests(tmp_path / "disk") == digests(tmp_path / "memory") and made


def test_a_shard_maps_too(tiny_source, tmp_path, text_file, request):
    calibration = asked(text_file)
    calibrate_model(tiny_source, tmp_path / "statistics", calibration)
    options = RefactorOptions(calibration=calibration, profile_tokens=0)
    given = {"calibration": tmp_path / "statistics"}
    refactor_shard(tiny_source, tmp_path / "memory", "1/2", options, **given)
    made = request.getfixturevalue("no_memory")
    needed = rehearse(refactor_shard, tiny_source, tmp_path / "disk", "1/2", options, **given)
    assert needed.needed[MAPPED] and needed.seconds
    refactor_shard(tiny_source, tmp_path / "disk", "1/2", options, **given)
    one, two = (digests(tmp_path / f"{name}.partial") for name in ("memory", "disk"))
    assert one == two and made


def test_a_layer_on_disk_has_a_forecast_of_time(tiny_source, tmp_path, text_file, no_memory, monkeypatch):
    monkeypatch.setattr(pilot, "available_memory", lambda: 1 << 30)
    calibration = asked(text_file)
    for job, options in (
        (refactor, RefactorOptions(calibration=calibration, profile_tokens=128, profile_points=1)),
        (calibrate_model, calibration),
    ):
        needed = rehearse(job, tiny_source, tmp_path / "out", options)
        assert needed.needed[MAPPED] and needed.seconds and needed.needed["cpu_seconds"]
    assert not no_memory, "a rehearsal maps nothing"


def test_the_disk_counts_where_a_file_does_not_stay_in_memory(tiny_source, monkeypatch):
    from moe_prism.forecast.work_time import Seconds
    from moe_prism.jobs import disk_time

    monkeypatch.setattr(disk_time, "written", lambda size, hashed: Seconds(size, 0))
    monkeypatch.setattr(disk_time, "read_back", lambda _, size: Seconds(0, size))
    one = pilot.Pilot(tiny_source, on_disk=True)
    assert disk_time.OnDisk(100, kept=100).seconds(one, 2, 7) == Seconds(200, 0)
    assert disk_time.OnDisk(100, kept=99).seconds(one, 2, 7) == Seconds(200, 1400)
    assert disk_time.OnDisk(100, kept=50).seconds(one, 2, 1, 0.5) == Seconds(100, 0)


def test_a_few_experts_stand_for_unevenly_chosen_ones():
    assert typical([8, 1, 2, 3, 4, 5, 6, 7], 4, 0, 100) == [2, 4, 6, 8]
    assert typical([1, 1000], 2, 16, 64) == [16, 64]
    assert SolvedRows(64, 0, [10, 10, 300, 300]).rows(counted(1, 1), 2) == [64, 64], "what too few rows came to borrows"
    assert SolvedRows(2000, 1000, []).rows(counted(1, 3), 2) == [256, 750]


def counted(*chosen):
    import torch

    from moe_prism.calibrate.statistics import LayerStatistics

    return LayerStatistics("x", {"counts": {"count": torch.tensor(chosen)}})


def test_the_profile_runs_fewer_tokens_at_a_time_than_the_pass(tiny_source, text_file, monkeypatch):
    from moe_prism.artefact.source import Weights

    found = []
    monkeypatch.setattr(needed_by_refactor, "largest", lambda phases: found.append(phases) or phases[0])
    options = RefactorOptions(calibration=CalibrateOptions(text=str(text_file), tokens=8192, length=256, low_memory=True))
    needed_by_refactor.needed_by(Weights(tiny_source), options)
    passing, profile = found[0][2], found[0][3]
    assert passing["activations_bytes"] == 4 * profile["activations_bytes"], "2,048 and 512 tokens"
