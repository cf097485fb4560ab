"""A dense checkpoint written as a mixture of experts, loaded by unmodified transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe_prism.checkpoint import read_manifest
from moe_prism.errors import UsageError
from moe_prism.jobs.frontier import measure_frontier
from moe_prism.jobs.frontier_files import keep_frontier
from moe_prism.jobs.inspect import inspect_model
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.jobs.rehearsal import rehearse
from moe_prism.jobs.split import split_model
from moe_prism.jobs.verify import verify
from moe_prism.options.calibrate import CalibrateOptions
from moe_prism.options.frontier import FrontierOptions
from moe_prism.options.serve import ServeOptions
from moe_prism.options.split import SplitOptions
from moe_prism.serve.config import Config
from moe_prism.serve.engine.start import start_engine

IDS = torch.arange(3, 43).reshape(2, 20) * 7


@pytest.fixture(scope="module")
def text(text_file):
    return CalibrateOptions(text=str(text_file), tokens=1024, length=32, reservoir=512)


def asked(text, **more) -> SplitOptions:
    return SplitOptions(**{"experts": 4, "calibration": text, **more})


@pytest.fixture(scope="module")
def tiny_dense(tiny_dense, tmp_path_factory):
    """Wide enough for four experts."""
    out = tmp_path_factory.mktemp("dense") / "dense"
    shutil.copytree(tiny_dense, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def split(tiny_dense, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("split") / "out"
    return split_model(tiny_dense, out, asked(text))


@torch.no_grad()
def logits(folder, **config):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config)(input_ids=IDS).logits


def relative(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "options", [{}, {"method": "equal"}, {"method": "random", "shared": 0.5}, {"dtype": None, "shared": 0.0}], ids=str
)
def test_all_experts_on_is_the_dense_model(tiny_dense, text, tmp_path, options):
    found = split_model(tiny_dense, tmp_path / "out", asked(text, **options))
    assert relative(logits(tmp_path / "out"), logits(tiny_dense)) < 1e-5
    assert found.facts["all_on_difference"] < 1e-5
    rows = AutoTokenizer.from_pretrained(tmp_path / "out")("def f(x):", return_tensors="pt")
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (tiny_dense, tmp_path / "out")]
    one, other = (model.generate(**rows, max_new_tokens=20, do_sample=False) for model in models)
    assert torch.equal(one, other)


def test_fewer_active_experts_are_a_number_in_the_configuration(tiny_dense, text, split, tmp_path):
    split_model(tiny_dense, tmp_path / "two", asked(text, active=2))
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["num_experts_per_tok"] == 2 and config["model_type"] == "qwen2_moe"
    assert relative(logits(tmp_path / "two"), logits(split.folder, num_experts_per_tok=2)) == 0
    assert relative(logits(tmp_path / "two"), logits(tiny_dense)) > 1e-3
    assert relative(logits(tmp_path / "two", num_experts_per_tok=4), logits(tiny_dense)) < 1e-5


def test_half_by_importance_and_ridge_beats_half_by_lot(tiny_dense, text, split, tmp_path):
    lot = split_model(tiny_dense, tmp_path / "lot", asked(text, method="random"))
    for mine, other in zip(split.facts["layers"], lot.facts["layers"], strict=True):
        assert mine["error"] < mine["error_of_random_router"] < 1 and mine["error"] < other["error"]


def test_domains_have_masks(tiny_dense, tmp_path):
    text = CalibrateOptions(domains=["code=domains/python", "prose=domains/prose"], tokens=1024, length=32, reservoir=128)
    found = split_model(tiny_dense, tmp_path / "out", asked(text, method="read-me"))
    assert all(0 < row["jaccard_mean"] <= 1 for row in found.facts["layers"])
    assert relative(logits(tmp_path / "out"), logits(tiny_dense)) < 1e-5


def test_a_layer_at_a_time_gives_the_same_model(tiny_dense, text, split, tmp_path):
    split_model(tiny_dense, tmp_path / "out", asked(replace(text, low_memory=True)))
    assert relative(logits(tmp_path / "out"), logits(split.folder)) < 1e-5


def test_interrupted_it_ends_in_the_same_bytes(tiny_dense, text, split, tmp_path):
    class Stopped:
        def __init__(self, stage):
            self.stage = stage

        def __enter__(self):
            def update(_done, _total):
                if self.stage == "split":
                    raise KeyboardInterrupt

            return update

        def __exit__(self, *_):
            pass

    with pytest.raises(KeyboardInterrupt):
        split_model(tiny_dense, tmp_path / "again", asked(text), report=Stopped)
    assert not (tmp_path / "again").exists()
    assert (tmp_path / "again.partial" / "model-00001-of-00003.safetensors").is_file()
    split_model(tiny_dense, tmp_path / "again", asked(text), resume=True)
    names = {file.name for file in split.folder.iterdir()}
    assert names == {file.name for file in (tmp_path / "again").iterdir()}
    for name in names:
        assert (split.folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    done = split_model(tiny_dense, tmp_path / "again", asked(text), resume=True)
    assert done.facts == json.loads(json.dumps(split.facts))


def test_the_folder_is_whole_and_everything_else_takes_it(split, tmp_path, text):
    assert all(check.detail for check in verify(split.folder))
    assert read_manifest(split.folder)["kind"] == "split"
    rows = inspect_model(split.folder)["layers"]
    assert [row["experts"] for row in rows if row["kind"] == "moe"] == [4, 4]
    options = FrontierOptions(text=text.text, methods=("uniform",), tokens=128, length=32, calibration_tokens=128)
    found = {point.name: point for point in measure_frontier(split.folder, options).every}
    assert found["uniform-1"].kl > 0 and found["uniform-1"].active_expert_bytes < found["uniform-3"].active_expert_bytes
    made = refactor(split.folder, tmp_path / "elastic", RefactorOptions(n_sub=2, calibration=text, profile_tokens=0))
    assert made and relative(logits(tmp_path / "elastic"), logits(split.folder)) < 1e-5


def test_a_rehearsal_writes_nothing_and_says_what_it_takes(tiny_dense, text, tmp_path):
    needed = rehearse(split_model, tiny_dense, tmp_path / "out", asked(text))
    assert needed.disk_bytes > 1 << 20 and needed.peak_memory_bytes > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 32}, "128 neurons make no 32 experts"),
        ({"active": 9}, "--active 9 of --experts 4"),
        ({"density": 0.3}, "--density means nothing to 'importance'"),
        ({"method": "read-me"}, "'read-me' compares domains"),
        ({"method": "importanc"}, "unknown split 'importanc'"),
    ],
)
def test_what_cannot_be_is_refused(tiny_dense, text, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        split_model(tiny_dense, tmp_path / "out", asked(text, **options))
    assert not list(tmp_path.iterdir())


def test_a_model_with_experts_and_one_of_another_kind_are_refused(tiny_source, tiny_dense, text, tmp_path):
    with pytest.raises(UsageError, match="has experts already"):
        split_model(tiny_source, tmp_path / "out", asked(text))
    shutil.copytree(tiny_dense, tmp_path / "biased")
    config = json.loads((tmp_path / "biased" / "config.json").read_text())
    (tmp_path / "biased" / "config.json").write_text(
        json.dumps({**config, "sliding_window": 8, "model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    )
    with pytest.raises(UsageError, match="attends to 8 tokens"):
        split_model(tmp_path / "biased", tmp_path / "out", asked(text))


@pytest.mark.slow
def test_it_is_served_at_measured_points(split, text, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(split.folder, folder)
    options = FrontierOptions(text=text.text, methods=("uniform",), tokens=128, length=32, calibration_tokens=128)
    keep_frontier(measure_frontier(folder, options), folder)
    assert all(check.detail for check in verify(folder))
    running = start_engine(folder, ServeOptions(probe_seconds=0.1), Config())
    try:
        assert {level.name for level in running.facts.ladder.levels} > {"full", "uniform-1"}
    finally:
        running.stop()


@torch.no_grad()
def test_two_active_experts_are_the_dense_model_with_a_mask_over_its_neurons(tiny_dense, split):
    """Which neuron went where is read from the files, and the router's choice is made by hand."""
    dense = AutoModelForCausalLM.from_pretrained(tiny_dense, dtype=torch.float32)
    moe = AutoModelForCausalLM.from_pretrained(split.folder, dtype=torch.float32, num_experts_per_tok=2)
    for mine, theirs in zip(dense.model.layers, moe.model.layers, strict=True):
        rows = mine.mlp.up_proj.weight
        inside = theirs.mlp.experts.gate_up_proj.chunk(2, 1)[1]
        home = [next((e for e, own in enumerate(inside) if bool((own == row).all(1).any())), -1) for row in rows]
        assert home.count(-1) == 32 and all(home.count(e) == 24 for e in range(4))

        def run(x, mlp=mine.mlp, home=tuple(home), router=theirs.mlp.gate.weight):
            a = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            for b in range(x.shape[0]):
                for t in range(x.shape[1]):
                    best = set((router @ x[b, t]).softmax(0).topk(2).indices.tolist())
                    a[b, t] *= torch.tensor([float(e == -1 or e in best) for e in home])
            return mlp.down_proj(a)

        mine.mlp.forward = run
    assert relative(moe(input_ids=IDS).logits, dense(input_ids=IDS).logits) < 1e-5
