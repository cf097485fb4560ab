"""A calibration inside the real engine against the same in transformers. `make test-vllm`; skipped where vLLM is missing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from moe_prism.cli import main
from moe_prism.errors import UsageError
from moe_prism.jobs.calibrate import calibrate_model, read_statistics
from moe_prism.model import resolve
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.serve.vllm.calibrate import calibrate_with_vllm

OPTIONS = CalibrateOptions(text="stdlib", tokens=4096, length=256, reservoir=64, collectors=["counts", "tokens", "inputs"])


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers") / "statistics"
    calibrate_model("nano", folder, OPTIONS)
    return read_statistics(folder)


def compare(found, wanted):
    """Attention of another kernel moves a hidden state by some 1e-6, and now and then a token to another expert."""
    assert found.facts == wanted.facts and torch.equal(found.profile, wanted.profile)
    for mine, theirs in zip(found.layers, wanted.layers, strict=True):
        a, b = mine.values, theirs.values
        moved = int((a["counts"]["count"] - b["counts"]["count"]).abs().sum())
        assert moved <= 2e-3 * int(b["counts"]["count"].sum()), f"{moved} choices differ in {mine.name}"
        for name, key in (("counts", "weight_sum"), ("inputs", "sq")):
            difference = (a[name][key] - b[name][key]).norm() / b[name][key].norm()
            assert difference <= 2e-3, f"{name} {key} of {mine.name}: {difference}"
        same = a["tokens"]["key"] == b["tokens"]["key"]
        assert float(same.double().mean()) >= 0.98
        near = (a["tokens"]["x"].float() - b["tokens"]["x"].float())[same].norm() / b["tokens"]["x"].float()[same].norm()
        assert near <= 1e-3


@pytest.mark.parametrize("engine", [{}, {"tensor_parallel_size": 2}], ids=["one worker", "two workers"])
def test_statistics_are_those_of_transformers(wanted, tmp_path, engine):
    found = calibrate_with_vllm("nano", tmp_path / "out", OPTIONS, engine)
    read = read_statistics(tmp_path / "out")
    assert [layer.name for layer in found.layers] == [layer.name for layer in read.layers]
    compare(read, wanted)


def test_the_command_and_a_refactor_of_it(tmp_path):
    asked = ["--text", "stdlib", "--tokens", "2048", "--length", "256", "--reservoir", "64"]
    out = tmp_path / "statistics"
    assert main(["calibrate", "nano", *asked, "-o", str(out), "--engine", "vllm"]) == 0
    assert main(["refactor", "nano", "-o", str(tmp_path / "elastic"), "--calibration", str(out), "--profile-tokens", "0"]) == 0


@pytest.mark.parametrize(
    ("options", "engine", "words"),
    [
        (CalibrateOptions(collectors=["counts", "gradients"]), {}, "'gradients'"),
        (CalibrateOptions(low_memory=True), {}, "--low-memory"),
        (CalibrateOptions(), {"max_num_seqs": 4}, "max_num_seqs"),
        (CalibrateOptions(), {"data_parallel_size": 2}, "data parallelism"),
    ],
)
def test_what_it_has_not_is_refused_before_it_starts(tmp_path, options, engine, words):
    with pytest.raises(UsageError, match=words):
        calibrate_with_vllm("nano", tmp_path / "out", options, engine)
    assert not (tmp_path / "out").exists() and resolve("nano").is_dir()
