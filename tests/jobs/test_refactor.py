"""What `refactor` writes is an ordinary checkpoint: the same function with and without moe_prism, the same bytes every time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import moe_prism
from moe_prism.checkpoint import OutputFolder
from moe_prism.elastic.runtime import slots_per_token
from moe_prism.errors import UsageError
from moe_prism.frontier.cost import measured_cost
from moe_prism.jobs import calibrate
from moe_prism.jobs.calibrate import calibrate_model, read_statistics
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.model import load_model, load_tokenizer
from moe_prism.point import OperatingPoint, SlotRule
from tests.tiers import by_night
from tests.tiny_sources import digests, save_tiny, starve

PROMPT = "def read_lines(path):\n"
SIDE = ("prism.json", "prism.safetensors")
NEW_TOKENS = 12

# -I: no environment, no working folder on the path; the finder makes any import of moe_prism an error
ALONE = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moe_prism":
            raise ImportError("moe_prism is not installed here")
sys.meta_path.insert(0, Blocked())
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt, count, source, *folders = json.loads(sys.argv[1])
def run(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    with torch.no_grad():
        return model(**rows).logits, model.generate(**rows, do_sample=False, max_new_tokens=count)[0].tolist()
logits, tokens = run(source)
found = [run(folder) for folder in folders]
try:
    import moe_prism
    alone = False
except ImportError:
    alone = True
print(json.dumps({
    "alone": alone, "scale": float(logits.abs().max()),
    "errors": [float((other - logits).abs().max()) for other, _ in found],
    "same_tokens": [other == tokens for _, other in found],
}))
"""


@pytest.fixture(scope="module")
def bare(elastic_nano, tmp_path_factory):
    """The refactored model without what makes it elastic."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(elastic_nano, folder, ignore=shutil.ignore_patterns(*SIDE))
    return folder


def test_plain_transformers_loads_it_where_moe_prism_cannot_be_imported(elastic_nano, bare):
    arguments = json.dumps([PROMPT, NEW_TOKENS, str(moe_prism.model.named.NANO), str(elastic_nano), str(bare)])
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["alone"]
    assert max(result["errors"]) <= 1e-5 * result["scale"]
    assert result["same_tokens"] == [True, True]


def test_without_the_side_files_it_is_no_elastic_model(bare):
    with pytest.raises(UsageError, match=r"no prism\.json"):
        moe_prism.load(bare)


@torch.no_grad()
@pytest.mark.parametrize("always_split", [False, True])
def test_full_budget_is_the_source_model(elastic_nano, always_split):
    source = load_model("nano", torch.float32)
    model, tokenizer = moe_prism.load(elastic_nano)
    model._moe_prism.always_split = always_split
    rows = tokenizer(PROMPT, return_tensors="pt")
    expected = source(**rows).logits
    with moe_prism.operating_point(model, 1.0):
        error = (model(**rows).logits - expected).abs().max()
        tokens = model.generate(**rows, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert float(error) <= 1e-5 * float(expected.abs().max())
    assert torch.equal(tokens, source.generate(**rows, do_sample=False, max_new_tokens=NEW_TOKENS))


def test_same_inputs_and_seed_give_the_same_bytes(tiny_source, elastic_tiny, tiny_calibration, tmp_path):
    refactor(tiny_source, tmp_path / "again", RefactorOptions(calibration=tiny_calibration))
    assert digests(tmp_path / "again") == digests(elastic_tiny)
    other = RefactorOptions(calibration=replace(tiny_calibration, seed=1), seed=1)
    refactor(tiny_source, tmp_path / "other", other)
    assert digests(tmp_path / "other").keys() == digests(elastic_tiny).keys()
    assert moe_prism.verify(tmp_path / "other")


def weights(folder):
    return {name: digest for name, digest in digests(folder).items() if name not in ("prism.json", "README.md")}


def test_one_layer_at_a_time_sees_what_the_whole_model_sees(tiny_source, tiny_calibration, tmp_path):
    options = replace(tiny_calibration, tokens=1024)
    whole = calibrate_model(tiny_source, tmp_path / "whole", options)
    streamed = calibrate_model(tiny_source, tmp_path / "streamed", replace(options, low_memory=True))
    for a, b in zip(whole.layers, streamed.layers, strict=True):
        assert torch.equal(a.values["counts"]["count"], b.values["counts"]["count"])
        assert torch.equal(a.values["tokens"]["key"], b.values["tokens"]["key"])
        # low memory runs wider batches, whose matrix products may round differently: values are equal to rounding, not in bytes
        for name in ("x", "weight"):
            torch.testing.assert_close(a.values["tokens"][name], b.values["tokens"][name], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("low_memory", by_night([False, True], True))
def test_calibrate_then_refactor_equals_refactor_in_one_go(tiny_source, tiny_calibration, low_memory, tmp_path):
    options = RefactorOptions(calibration=replace(tiny_calibration, tokens=1024, low_memory=low_memory))
    calibrate_model(tiny_source, tmp_path / "calibration", options.calibration)
    refactor(tiny_source, tmp_path / "two", options, calibration=tmp_path / "calibration")
    refactor(tiny_source, tmp_path / "one", options)
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "prism.json").read_text()) for name in ("one", "two"))
    assert one["layers"] == two["layers"] and one["calibration"] == two["calibration"]
    assert len(read_statistics(tmp_path / "calibration").layers) == len(one["layers"])


def test_an_interrupted_calibration_goes_on_where_it_was(tiny_source, tiny_calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "SNAPSHOT_SECONDS", 0.0)
    options = replace(tiny_calibration, tokens=1024)  # 32 windows, four batches
    seen = []

    @contextmanager
    def stop_at_16(_title):
        def update(done, _total):
            seen.append(done)
            if done == 16 and seen.count(16) == 1:
                raise KeyboardInterrupt

        yield update

    with pytest.raises(KeyboardInterrupt):
        calibrate_model(tiny_source, tmp_path / "out", options, report=stop_at_16)
    assert not (tmp_path / "out").exists()
    calibrate_model(tiny_source, tmp_path / "out", options, resume=True, report=stop_at_16)
    assert seen == [8, 16, 16, 24, 32]  # the second batch had no snapshot yet, the first is not repeated
    calibrate_model(tiny_source, tmp_path / "straight", options)
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")
    again = calibrate_model(tiny_source, tmp_path / "out", options, resume=True)  # nothing left to do
    assert torch.equal(again.layers[0].values["tokens"]["x"], read_statistics(tmp_path / "out").layers[0].values["tokens"]["x"])


def test_statistics_are_written_twice_only_where_work_follows(tiny_source, tiny_calibration, tmp_path, monkeypatch):
    saved, stock = [], OutputFolder.save_tensors
    monkeypatch.setattr(OutputFolder, "save_tensors", lambda self, name, *more: saved.append(name) or stock(self, name, *more))
    calibrate_model(tiny_source, tmp_path / "calibration", tiny_calibration)
    assert calibrate.SNAPSHOT not in saved
    refactor(tiny_source, tmp_path / "out", RefactorOptions(calibration=tiny_calibration, profile_tokens=0))
    assert calibrate.SNAPSHOT in saved, "solving may be interrupted, and then the pass is not run again"


def test_a_calibration_of_another_model_is_refused(tiny_source, tiny_calibration, tmp_path):
    save_tiny("olmoe", tmp_path / "other", num_hidden_layers=1)
    options = replace(tiny_calibration, tokens=256)
    calibrate_model(tmp_path / "other", tmp_path / "calibration", options)
    with pytest.raises(UsageError, match="another checkpoint"):
        refactor(tiny_source, tmp_path / "out", RefactorOptions(), calibration=tmp_path / "calibration")
    with pytest.raises(UsageError, match="not an elastic model"):
        moe_prism.load(tmp_path / "calibration")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_prism_json_states_the_facts(elastic_nano):
    manifest = json.loads((elastic_nano / "prism.json").read_text())
    config = json.loads((elastic_nano / "config.json").read_text())
    assert manifest["kind"] == "elastic" and manifest["source"]["name"] == "nano"
    assert manifest["n_sub"] == 4 and manifest["gates"] == 0 and manifest["bytes_per_weight"] == 2
    assert len(manifest["layers"]) == config["num_hidden_layers"]
    for layer in manifest["layers"]:
        assert (layer["experts"], layer["width"]) == (config["num_experts"], config["intermediate_size"])
        assert 0 < layer["cost_share"] < 0.75  # three quarters is what blocks of equal mass would cost
    assert manifest["calibration"]["tokens"] == 4096 and manifest["calibration"]["documents"]
    assert manifest["options"]["solver"] == "alt" and manifest["versions"]["torch"]
    present = {p.name for p in elastic_nano.iterdir()} - {"prism.json"}
    assert set(manifest["files"]) == present and moe_prism.verify(elastic_nano)
    assert str(elastic_nano.parent) not in json.dumps(manifest)


def test_names_and_shapes_are_those_of_the_source(tiny_source, elastic_tiny):
    shards = {p.name for p in tiny_source.iterdir()}
    assert {p.name for p in elastic_tiny.iterdir()} == shards | {*SIDE, "README.md"}
    for shard in tiny_source.glob("model*.safetensors"):
        head = int.from_bytes(shard.read_bytes()[:8], "little") + 8
        assert (elastic_tiny / shard.name).read_bytes()[:head] == shard.read_bytes()[:head]


@torch.no_grad()
def test_a_dense_model_is_one_expert(tiny_dense, tiny_calibration, tmp_path):
    done = refactor(tiny_dense, tmp_path / "out", RefactorOptions(n_sub=4, calibration=replace(tiny_calibration, tokens=512)))
    assert [layer["experts"] for layer in done.manifest["layers"]] == [1, 1]
    model, tokenizer = moe_prism.load(tmp_path / "out")
    source = load_model(tiny_dense, torch.float32)
    rows = tokenizer("import os", return_tensors="pt")
    expected = source(**rows).logits
    for split in (False, True):
        model._moe_prism.always_split = split
        torch.testing.assert_close(model(**rows).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with moe_prism.operating_point(model, k=1) as elastic, elastic.count():
        assert not torch.allclose(model(**rows).logits, expected)
        assert all(layer.counter.kept == rows["input_ids"].numel() for layer in elastic.layers)


@pytest.mark.slow
@torch.no_grad()
def test_a_predictor_fitted_on_request_is_stored_used_and_paid_for(tiny_source, tiny_calibration, tmp_path):
    options = RefactorOptions(
        objective="output-space",
        solver="nested",
        gates=2,
        extra_scorers=["low-rank"],
        calibration=replace(tiny_calibration, tokens=512),
    )
    done = refactor(tiny_source, tmp_path / "out", options)
    assert 0 < done.to_json()["partition_cost_share"] < 1
    assert refactor(tiny_source, tmp_path / "out", options, resume=True).manifest == done.manifest
    model, tokenizer = moe_prism.load(tmp_path / "out")
    rows = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    params = {}
    for scorer in ("ridge", "low-rank"):
        three = OperatingPoint(slots=SlotRule(budget=3 / slots_per_token(model._moe_prism), rule="product", scorer=scorer))
        with moe_prism.operating_point(model, point=three) as elastic, elastic.count():
            assert torch.isfinite(model(input_ids=rows).logits).all()
            params[scorer] = measured_cost(elastic, elastic.step).active_expert_params
    # the same slots are kept in number, so the difference is what the predictors read
    layers, k = elastic.layers, model.config.num_experts_per_tok
    ridge, low = (sum(layer.scorer(name).parameters_per_expert() for layer in layers) for name in ("ridge", "low-rank"))
    shared = sum(layer.scorer("low-rank").parameters_per_token() for layer in layers)
    assert shared > 0 and params["low-rank"] - params["ridge"] == k * (low - ridge) + shared


def test_f09_starved_experts_are_reported_and_handled(tiny_calibration, tmp_path):
    model = save_tiny("olmoe", tmp_path / "source", num_experts=6)
    dead = starve(model, 1)
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    statistics = calibrate_model(tmp_path / "source", tmp_path / "calibration", tiny_calibration)
    assert {(1, e, 0) for e in dead} <= set(statistics.starved(1))
    done = refactor(tmp_path / "source", tmp_path / "out", RefactorOptions(), calibration=tmp_path / "calibration")
    assert set(dead) <= set(done.manifest["layers"][1]["starved"])
    assert done.to_json()["starved_experts"] >= len(dead)
    elastic, tokenizer = moe_prism.load(tmp_path / "out")
    rows = tokenizer("class A:\n    pass", return_tensors="pt")
    expected = model.float()(**rows).logits.detach()
    elastic._moe_prism.always_split = True
    torch.testing.assert_close(elastic(**rows).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with moe_prism.operating_point(elastic, 0.5):
        assert torch.isfinite(elastic(**rows).logits).all()


def test_the_tokenizer_travels(elastic_nano):
    text = "for i in range(10):\n    print(i)\n"
    assert load_tokenizer(elastic_nano)(text)["input_ids"] == load_tokenizer("nano")(text)["input_ids"]
