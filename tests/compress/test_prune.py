"""`moe-prism prune` from end to end on tiny folders: plain and elastic sources, resume, refusals, the frontier method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_prism import cli
from moe_prism.artefact.load import load
from moe_prism.artefact.open import open_model
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.checkpoint import OutputFolder
from moe_prism.compress.changes import change_of
from moe_prism.compress.prune import pruned
from moe_prism.elastic import operating_point
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.frontier import measure_frontier, subject_of
from moe_prism.jobs.prune import prune_model, select_experts
from moe_prism.jobs.trace import TraceOptions, record_trace
from moe_prism.jobs.verify import verify
from moe_prism.methods.find import method
from moe_prism.methods.prune import select
from moe_prism.methods.prune.select import PruneOptions, measured_counts
from moe_prism.methods.statistics import statistics_of
from moe_prism.model import find_layers, load_model
from moe_prism.options.frontier import FrontierOptions
from tests.tiny_sources import digests, save_tiny

IDS = torch.arange(3, 67).reshape(4, 16)


@pytest.fixture(scope="module")
def options(text_file) -> PruneOptions:
    return PruneOptions(calibration=CalibrateOptions(text=str(text_file), tokens=1024, length=32), profile_tokens=64)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.fixture(scope="module")
def small(tiny_source, tmp_path_factory, options) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune_model(tiny_source, out, options)
    return out


def test_the_written_folder_is_the_masked_model(tiny_source, small, options):
    selection = select_experts(tiny_source, options).selection
    assert json.loads((small / "kept.json").read_text()) == json.loads(json.dumps(selection.to_json()))
    source = load_model(tiny_source, torch.float32)
    with pruned(source, selection.choices):
        wanted = logits(source)
    smaller = load_model(small, torch.float32)
    assert smaller.config.num_experts == 2
    assert float((logits(smaller) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert {check.name for check in verify(small)} >= {"manifest", "files", "values"}
    assert sum(f.stat().st_size for f in small.glob("*.safetensors")) < sum(
        f.stat().st_size for f in tiny_source.glob("*.safetensors")
    )


def test_the_routing_of_a_pruned_folder_can_be_traced(small, text_file):
    trace = record_trace(small, None, TraceOptions(text=str(text_file), tokens=128, length=32, prompt=8))
    assert (trace.experts, trace.n_sub) == (2, 1)


def test_a_pruned_folder_can_be_refactored_pruned_again_and_measured(small, tmp_path, tiny_calibration):
    from moe_prism.jobs.refactor import RefactorOptions, refactor

    refactor(small, tmp_path / "elastic", RefactorOptions(calibration=tiny_calibration, profile_tokens=0))
    assert load(tmp_path / "elastic")[0].config.num_experts == 2
    with pytest.raises(UsageError, match="a token uses 2"):
        prune_model(small, tmp_path / "again", PruneOptions(criterion="first-half"))


@pytest.mark.parametrize("stage", ["calibrate", "write"])
def test_an_interrupted_run_continues_to_the_same_bytes(tiny_source, small, options, tmp_path, monkeypatch, stage):
    out, calls = tmp_path / "out", 0
    save, open_stage = OutputFolder.save_tensors, OutputFolder.stage

    def interrupted(self, name, *args, **kwargs):
        nonlocal calls
        calls += name.startswith("calibration" if stage == "calibrate" else "model-")
        if calls == 2 or (stage == "calibrate" and calls == 1):
            raise KeyboardInterrupt
        return (save if stage == "calibrate" else open_stage)(self, name, *args, **kwargs)

    monkeypatch.setattr(OutputFolder, "save_tensors" if stage == "calibrate" else "stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_model(tiny_source, out, options)
    monkeypatch.undo()
    assert not out.exists() and (tmp_path / "out.partial").exists()
    with pytest.raises(UsageError, match="unfinished"):
        prune_model(tiny_source, out, options)
    prune_model(tiny_source, out, options, resume=True)
    assert digests(out) == digests(small)
    assert prune_model(tiny_source, out, options, resume=True).folder == out  # nothing left to do


def test_kept_json_repeats_a_selection(tiny_source, small, tmp_path):
    prune_model(tiny_source, tmp_path / "out", PruneOptions(criterion="random"), kept=small / "kept.json")
    weights = {k: v for k, v in digests(small).items() if k.startswith("model") or k in ("config.json", "kept.json")}
    assert weights == {k: v for k, v in digests(tmp_path / "out").items() if k in weights}


def test_keeping_everything_copies_the_weights(tiny_source, tmp_path):
    prune_model(tiny_source, tmp_path / "out", PruneOptions(criterion="first-half", keep=1.0))
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(load_model(tiny_source)))


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_an_elastic_folder_stays_elastic(elastic_tiny, tmp_path, budget):
    result = prune_model(elastic_tiny, tmp_path / "out", PruneOptions(criterion="last-half", keep=0.75))
    whole, _ = load(elastic_tiny)
    smaller, _ = load(tmp_path / "out")
    assert any(check.name == "side tensors" for check in verify(tmp_path / "out"))
    assert [layer.num_experts for layer in find_layers(smaller)] == [3, 3]
    with pruned(whole, result.selection.choices), operating_point(whole, budget):
        wanted = logits(whole)
    with operating_point(smaller, budget):
        found = logits(smaller)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_one_calibration_serves_refactor_and_every_criterion(tiny_source, text_file, tmp_path):
    from moe_prism.jobs.calibrate import calibrate_model

    every = ["counts", "tokens", "outputs", "scores", "grams"]
    calibrate_model(
        tiny_source,
        tmp_path / "cal",
        CalibrateOptions(text=str(text_file), tokens=512, length=32, reservoir=64, collectors=every),
    )
    for name in ("soft-count", "gate-norm", "output-error"):
        selection = select_experts(
            tiny_source, PruneOptions(criterion=name, protect=["super-experts"]), calibration=tmp_path / "cal"
        ).selection
        assert [len(c.kept) for c in selection.choices] == [2, 2]
    calibrate_model(tiny_source, tmp_path / "plain", CalibrateOptions(text=str(text_file), tokens=512, length=32, reservoir=64))
    with pytest.raises(UsageError, match="holds no 'outputs'"):
        select_experts(tiny_source, PruneOptions(criterion="gate-norm"), calibration=tmp_path / "plain")


def test_measured_allocation_spends_the_same_number(tiny_source, options):
    from dataclasses import replace

    selection = select_experts(tiny_source, replace(options, allocation="measured", keep=0.75)).selection
    assert sum(len(c.kept) for c in selection.choices) == 6 and min(len(c.kept) for c in selection.choices) >= 2


def command(capsys, *arguments: object) -> tuple[int, str]:
    code = cli.main(["prune", *map(str, arguments)])
    return code, capsys.readouterr().err.strip()


@pytest.mark.parametrize(("arguments", "says"), [
    (["--keep", "0"], "more than 0 and at most 1"),
    (["--keep", "0.25", "--criterion", "first-half"], "a token uses 2"),
    (["--criterion", "softcount"], "did you mean 'soft-count'"),
    (["--protect", "experts"], "unknown protection"),
    (["--allocation", "global"], "one for all"),
    (["--criterion", "odd", "--allocation", "global", "--report-only"], "cannot compare layers"),
    (["--allocation", "measured", "--low-memory", "--report-only"], "whole model"),
    (["--seed", "-1"], "too small"),
])  # fmt: skip
def test_refusals_are_one_line(tiny_source, tmp_path, capsys, arguments, says):
    code, errors = command(capsys, tiny_source, "-o", tmp_path / "out", *arguments)
    assert code == 2 and says in errors and errors.count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_sources_that_cannot_be_pruned(tiny_dense, tiny_source, tmp_path, capsys):
    assert "dense MLP" in command(capsys, tiny_dense, "-o", tmp_path / "a")[1]
    assert "no output folder" in command(capsys, tiny_source)[1]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(CorruptError, match="'layers' is missing"):
        prune_model(tiny_source, tmp_path / "b", kept=tmp_path / "bad.json")
    rows = [{"experts": 4, "kept": [0, 9], "groups": None, "masked": False}] * 2
    (tmp_path / "other.json").write_text(json.dumps({"layers": rows}))
    with pytest.raises(CorruptError, match="experts that there are not"):
        prune_model(tiny_source, tmp_path / "b", kept=tmp_path / "other.json")
    rows = [{"experts": 99, "kept": [0, 9], "groups": None, "masked": False}] * 2
    (tmp_path / "other.json").write_text(json.dumps({"layers": rows}))
    with pytest.raises(UsageError, match="does not fit"):
        prune_model(tiny_source, tmp_path / "b", kept=tmp_path / "other.json")


def test_the_command_reports_as_json(tiny_source, capsys):
    assert cli.main(["prune", str(tiny_source), "--criterion", "even", "--report-only", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["kept"] for row in found["layers"]] == [[0, 2], [0, 2]] and found["resident_share"] == 0.5


def test_pruning_is_a_frontier_method(elastic_tiny, text_file):
    names = ("prune:soft-count", "prune:gate-norm-global")
    wanted = FrontierOptions(text=str(text_file), tokens=256, length=32, methods=names, calibration_tokens=512)
    result = measure_frontier(elastic_tiny, wanted)
    half = {p.name: p for p in result.points}
    full = half["full"]
    for name in ("prune:soft-count-0.5", "prune:gate-norm-global-0.5"):
        assert half[name].resident_expert_bytes < full.resident_expert_bytes and half[name].kl > 0
        assert half[name].active_expert_bytes == pytest.approx(full.active_expert_bytes)
    assert full.kl == 0


@pytest.mark.slow
def test_all_fractions_of_a_measured_method_share_one_profile(tmp_path, text_file, monkeypatch):
    """And keep what `select_experts`'s own profile for each of them says."""
    save_tiny("olmoe", tmp_path / "model", num_experts=8)
    opened, profiles, measure = open_model(tmp_path / "model"), [], select.measure
    monkeypatch.setattr(select, "measure", lambda *args, **more: profiles.append(1) or measure(*args, **more))
    subject = subject_of(opened, FrontierOptions(text=str(text_file), tokens=256, length=32, calibration_tokens=512))
    made = method("prune:gate-norm-measured")
    found = [change_of(named.point.weights).kept for named in made.points(subject)]
    assert len(profiles) == 1 and len(found) > 3
    statistics = statistics_of(subject, ("counts", "outputs"))
    for choices in found:
        kept = sum(len(choice.kept) for choice in choices)
        options = PruneOptions(criterion="gate-norm", keep=kept / 16, allocation="measured")
        counts = measured_counts(opened.model, subject.elastic, statistics, options, subject.calibration, lambda *_: None)
        assert [len(choice.kept) for choice in choices] == counts and sum(counts) == kept
