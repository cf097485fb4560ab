"""`recover`: what it writes, that it is worth it on a real model, how it goes on after an interruption, and bad input."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import moe_prism
from moe_prism import cli
from moe_prism.checkpoint import update_manifest
from moe_prism.data import token_windows
from moe_prism.elastic import operating_point
from moe_prism.errors import CorruptError, UsageError
from moe_prism.frontier.measure import measure
from moe_prism.jobs.recover import RecoverOptions, recover_model
from moe_prism.point import FULL
from tests.tiny_sources import digests

OPTIONS = RecoverOptions(bands=3, tokens=1024, length=32)
IDS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module")
def recovered(shared, elastic_tiny):
    return shared("recovered-tiny", lambda out: recover_model(elastic_tiny, out, OPTIONS))


@pytest.fixture(scope="module")
def repaired_nano(shared, elastic_nano):
    return shared("repaired-nano", lambda out: recover_model(elastic_nano, out, RecoverOptions(tokens=8192)))


def measured(folder, points, tokens=1024):
    """A measurement per point on held-out text."""
    model, tokenizer = moe_prism.load(folder)
    ids = token_windows(tokenizer, "stdlib", "evaluation", length=256, tokens=tokens).ids
    return measure(model, ids, points)


@torch.no_grad()
def test_it_is_the_same_model_at_full_budget_and_another_below(elastic_tiny, recovered):
    old, new = (moe_prism.load(folder)[0] for folder in (elastic_tiny, recovered))
    assert torch.equal(old(IDS).logits, new(IDS).logits)
    with operating_point(old, 0.5), operating_point(new, 0.5):
        assert not torch.allclose(old(IDS).logits, new(IDS).logits)


def test_weights_are_copied_and_facts_are_stated(elastic_tiny, recovered):
    old, new = digests(elastic_tiny), digests(recovered)
    assert {name for name in new if new[name] != old.get(name)} == {"prism.json", "prism.safetensors"}
    assert moe_prism.verify(recovered)
    manifest = json.loads((recovered / "prism.json").read_text())
    before = json.loads((elastic_tiny / "prism.json").read_text())
    (facts,), experts = manifest["recovery"], 2 * 4 * 3 * 32 * 16  # layers, experts, matrices, d, f
    assert (facts["method"], facts["bands"], facts["tokens"]) == ("repair", 3, 1024)
    assert facts["resident_bytes"] == experts * 2  # three copies of W_down, one of three matrices, in bfloat16
    assert facts["resident_share"] == 0.5  # of a float32 checkpoint
    assert set(before["calibration"]["documents"]) <= set(manifest["calibration"]["documents"])
    assert manifest["layers"] == before["layers"] and manifest["source"] == before["source"]


def test_same_inputs_same_bytes_also_one_layer_at_a_time_and_after_an_interruption(
    elastic_tiny, recovered, tmp_path, monkeypatch
):
    from moe_prism.recover import run

    monkeypatch.setattr(run, "groups", lambda layers, *_: [[i] for i in range(len(layers))])

    @contextmanager
    def stop_in_the_second_layer(_title):
        def update(done, total):
            if done > total // 2:
                raise KeyboardInterrupt

        yield update

    with pytest.raises(KeyboardInterrupt):
        recover_model(elastic_tiny, tmp_path / "out", OPTIONS, report=stop_in_the_second_layer)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--resume"):
        recover_model(elastic_tiny, tmp_path / "out", OPTIONS)
    with pytest.raises(UsageError, match="another options"):
        recover_model(elastic_tiny, tmp_path / "out", replace(OPTIONS, tokens=512), resume=True)
    recover_model(elastic_tiny, tmp_path / "out", OPTIONS, resume=True)
    assert digests(tmp_path / "out") == digests(recovered)
    recover_model(elastic_tiny, tmp_path / "out", OPTIONS, resume=True)  # nothing left to do
    with pytest.raises(UsageError, match="exists"):
        recover_model(elastic_tiny, tmp_path / "out", replace(OPTIONS, tokens=512), resume=True)


def test_what_was_measured_before_does_not_come_along(elastic_tiny, recovered, tmp_path):
    shutil.copytree(elastic_tiny, tmp_path / "measured")
    for name in ("frontier.json", "ladder.json", "report.html", "frontier.png"):
        (tmp_path / "measured" / name).touch()
    (tmp_path / "measured" / "experts.pack").touch()
    update_manifest(tmp_path / "measured", {"operating_points": [], "caches": ["experts.pack"]})
    (tmp_path / "measured" / "experts.pack").unlink()
    recover_model(tmp_path / "measured", tmp_path / "out", OPTIONS)
    assert digests(tmp_path / "out") == digests(recovered)


@pytest.mark.slow
def test_repaired_prism_nano_loses_less_on_text_it_has_not_seen(elastic_nano, repaired_nano):
    points = [FULL.with_budget(budget, "product") for budget in (1.0, 0.75, 0.5, 0.25)]
    (whole, *old), (same, *new) = (measured(folder, points) for folder in (elastic_nano, repaired_nano))
    assert whole.quality.kl < 1e-6 and same.quality.kl < 1e-6
    for before, after, most in zip(old, new, (0.99, 0.98, 0.98), strict=True):
        assert after.quality.kl < most * before.quality.kl
        # of a fixed K: the repair reads nothing more; which blocks and experts are touched follows from what tokens became
        assert replace(after.cost, distinct_expert_bytes=0, sends=None) == replace(
            before.cost, distinct_expert_bytes=0, sends=None
        )


def test_a_changed_weight_file_is_found(elastic_tiny, tmp_path):
    shutil.copytree(elastic_tiny, tmp_path / "elastic")
    with (tmp_path / "elastic" / "README.md").open("a") as file:
        file.write("changed")
    with pytest.raises(CorruptError, match=r"README\.md was changed"):
        recover_model(tmp_path / "elastic", tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        (("--method", "repare"), 2, "did you mean 'repair'?"),
        (("--bands", "0"), 2, "--bands 0"),
        (("--steps", "0"), 2, "--steps 0"),
        (("--tokens", "100", "--length", "32"), 2, "windows are too few"),
        (("--tokens", "0"), 2, "--tokens 0"),
        (("--length", "2"), 2, "--length 2"),
        (("--memory-mib", "0"), 2, "--memory-mib 0"),
        (("--text", "missing.txt"), 2, "does not exist"),
        (("--tokens", "many"), 2, "many"),
    ],
)
def test_bad_options(elastic_tiny, tmp_path, capsys, options, code, names):
    assert cli.main(["recover", str(elastic_tiny), "-o", str(tmp_path / "out"), *options]) == code
    line = capsys.readouterr().err
    assert line.startswith("moe-prism: error: ") and line.count("\n") == 1 and names in line
    assert not list(tmp_path.iterdir())


def test_bad_folders(elastic_tiny, tiny_source, recovered, tmp_path):
    with pytest.raises(UsageError, match=r"no prism\.json"):
        recover_model(tiny_source, tmp_path / "out", OPTIONS)
    with pytest.raises(UsageError, match="had --method repair already"):
        recover_model(recovered, tmp_path / "out", OPTIONS)
    with pytest.raises(UsageError, match="overlap"):
        recover_model(elastic_tiny, elastic_tiny / "inside", OPTIONS)
    assert not list(tmp_path.iterdir())
