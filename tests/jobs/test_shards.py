"""Layers that several processes solved are those of one, to the byte."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace

import pytest

from moe_prism.cli import main
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs import calibrate, solve_layer
from moe_prism.jobs.calibrate import calibrate_model
from moe_prism.jobs.refactor import RefactorOptions, refactor, refactor_shard
from moe_prism.jobs.refactor_units import Shard
from moe_prism.jobs.rehearsal import rehearse
from tests.ranks import run_ranks
from tests.tiny_sources import digests


@pytest.fixture(scope="module")
def options(tiny_calibration):
    return RefactorOptions(calibration=tiny_calibration, profile_tokens=64)


@pytest.fixture(scope="module")
def statistics(tiny_source, tiny_calibration, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "statistics"
    calibrate_model(tiny_source, folder, tiny_calibration)
    return folder


@pytest.fixture(scope="module")
def whole(tiny_source, options, statistics, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "whole"
    refactor(tiny_source, out, options, calibration=statistics)
    return digests(out)


def test_parts_are_joined_to_the_bytes_of_one_run(tiny_source, options, statistics, whole, tmp_path):
    parts = [tmp_path / "a", tmp_path / "b"]
    solved = [
        refactor_shard(tiny_source, part, f"{i + 1}/2", options, calibration=statistics).layers for i, part in enumerate(parts)
    ]
    assert set(solved[0]) & set(solved[1]) == set() and 0 in solved[0] and 1 in solved[1]
    assert not any(part.exists() for part in parts)
    refactor(tiny_source, tmp_path / "out", options, calibration=statistics, shards=parts)
    assert digests(tmp_path / "out") == whole


def test_experts_are_solved_by_as_many_threads_as_products_take(tiny_source, options, statistics, tmp_path, monkeypatch):
    """One process among several has its share of the cores only."""
    asked = []
    stock = solve_layer.solve_layer
    monkeypatch.setattr(solve_layer, "solve_layer", lambda *a, **k: asked.append(k["threads"]) or stock(*a, **k))
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    refactor_shard(tiny_source, tmp_path / "a", "1/2", options, calibration=statistics)
    assert set(asked) == {3}


def test_how_many_experts_are_cut_at_a_time_changes_nothing(tiny_source, options, statistics, whole, tmp_path, monkeypatch):
    """Their activations over the whole sample lie in memory together."""
    asked, stock = [], solve_layer.solve_layer
    monkeypatch.setattr(solve_layer, "solve_layer", lambda masses, *a, **k: asked.append(len(masses)) or stock(masses, *a, **k))
    monkeypatch.setattr(solve_layer, "experts_together", lambda: 3)
    refactor(tiny_source, tmp_path / "out", options, calibration=statistics)
    assert digests(tmp_path / "out") == whole and max(asked) == 3


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_statistics_of_one_layer_are_in_memory_at_a_time(
    tiny_source, options, statistics, whole, tmp_path, monkeypatch, low_memory
):
    held, most, stock = [], [], calibrate.read_tensors

    def read(path):
        found = stock(path)
        if path.name.startswith("layer-"):
            held.append(weakref.ref(found["tokens.x"]))
            most.append(sum(one() is not None for one in held))
        return found

    monkeypatch.setattr(calibrate, "read_tensors", read)
    asked = replace(options, calibration=replace(options.calibration, low_memory=low_memory))
    refactor(tiny_source, tmp_path / "out", asked, calibration=statistics)
    assert max(most) == 1 and len(most) > 2
    if not low_memory:
        assert digests(tmp_path / "out") == whole
    held.clear()
    refactor_shard(tiny_source, tmp_path / "a", "1/2", asked, calibration=statistics)
    assert max(most) == 1


def test_a_part_needs_what_it_solves_and_not_what_the_model_needs(tiny_source, options, statistics, tmp_path, capsys):
    one = max(len(file.read_bytes()) for file in statistics.glob("layer-*.safetensors"))
    part = rehearse(refactor_shard, tiny_source, tmp_path / "a", "1/2", options, calibration=statistics)
    model = rehearse(refactor, tiny_source, tmp_path / "out", options, calibration=statistics)
    assert 0.9 * one < part.needed["statistics_bytes"] < 1.1 * one
    assert part.disk_bytes < model.disk_bytes and part.peak_memory_bytes < model.peak_memory_bytes
    refactor_shard(tiny_source, tmp_path / "a", "1/2", options, calibration=statistics)
    written = sum(file.stat().st_size for file in (tmp_path / "a.partial").rglob("*.safetensors"))
    assert part.disk_bytes >= 0.8 * written
    asked = ["refactor", str(tiny_source), "-o", str(tmp_path / "b"), "--shard", "1/2", "--calibration", str(statistics)]
    assert main([*asked, "--profile-tokens", "64", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["disk_bytes"] == part.disk_bytes


def test_what_a_part_has_not_is_solved(tiny_source, options, statistics, whole, tmp_path):
    refactor_shard(tiny_source, tmp_path / "a", "1/2", options, calibration=statistics)
    refactor(tiny_source, tmp_path / "out", options, calibration=statistics, shards=[tmp_path / "a"])
    assert digests(tmp_path / "out") == whole


def test_a_part_of_other_options_is_refused(tiny_source, options, statistics, tmp_path):
    refactor_shard(tiny_source, tmp_path / "a", "1/2", options, calibration=statistics)
    other = RefactorOptions(calibration=options.calibration, profile_tokens=64, n_sub=2)
    with pytest.raises(UsageError, match=r"the shard '.*a' was started with another options"):
        refactor(tiny_source, tmp_path / "out", other, calibration=statistics, shards=[tmp_path / "a"])
    with pytest.raises(UsageError, match="there is no shard"):
        refactor(tiny_source, tmp_path / "out2", options, calibration=statistics, shards=[tmp_path / "nothing"])


def test_a_part_that_was_changed_is_refused(tiny_source, options, statistics, tmp_path):
    refactor_shard(tiny_source, tmp_path / "a", "1/1", options, calibration=statistics)
    file = next((tmp_path / "a.partial").glob("unit-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="is not what its journal says"):
        refactor(tiny_source, tmp_path / "out", options, calibration=statistics, shards=[tmp_path / "a"])


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "a/b", "1/99999", "-1/2"])
def test_what_is_no_part(text):
    with pytest.raises(UsageError, match="is no part of the work"):
        Shard.of(text)


def test_the_commands(tiny_source, tiny_calibration, statistics, whole, tmp_path, capsys):
    c = tiny_calibration
    asked = [str(tiny_source), "--profile-tokens", "64", "--calibration", str(statistics), "--text", c.text]
    asked += ["--tokens", str(c.tokens), "--length", str(c.length), "--reservoir", str(c.reservoir)]
    for i in (1, 2):
        assert main(["refactor", *asked, "-o", str(tmp_path / f"part{i}"), "--shard", f"{i}/2"]) == 0
    assert "--join" in capsys.readouterr().err
    assert main(["refactor", *asked, "-o", str(tmp_path / "out"), "--join", f"{tmp_path}/part1,{tmp_path}/part2"]) == 0
    assert digests(tmp_path / "out") == whole
    assert main(["refactor", str(tiny_source), "-o", str(tmp_path / "x"), "--shard", "1/2"]) == 2
    assert "calibrate" in capsys.readouterr().err
    assert main(["refactor", *asked, "-o", str(tmp_path / "x"), "--shard", "1/2", "--join", "a"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_torchrun_gives_the_bytes_of_one_process(tiny_source, tiny_calibration, options, statistics, tmp_path, given):
    c = tiny_calibration
    asked = ["refactor", str(tiny_source), "--profile-tokens", "64", "-o", str(tmp_path / "out"), "--text", c.text]
    asked += ["--tokens", str(c.tokens), "--length", str(c.length), "--reservoir", str(c.reservoir)]
    if given:
        shutil.copytree(statistics, tmp_path / "statistics")
        asked += ["--calibration", str(tmp_path / "statistics")]
    run_ranks(*asked)
    refactor(tiny_source, tmp_path / "alone", options)
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")
    assert sorted(p.name for p in tmp_path.iterdir() if "lock" not in p.name) == ["alone", "out"] + ["statistics"] * given
