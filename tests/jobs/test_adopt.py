"""A quantized copy of an elastic folder becomes elastic: same order or a refusal, cutoffs and price measured on what is there."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_prism
from moe_prism.artefact.load import side_tensors
from moe_prism.checkpoint import Source
from moe_prism.errors import UsageError
from moe_prism.jobs.adopt import adopt
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.model import load_to_run
from moe_prism.options.adopt import AdoptOptions
from tests.checkpoint.quantized import quantize
from tests.tiers import by_night
from tests.tiny_sources import digests, save_tiny

from .gguf_files import write_gguf

FEW = AdoptOptions(tokens=512)


@pytest.fixture(scope="session")
def pair(shared, tiny_calibration):
    """A folder with `source`, its `elastic` form, and that quantized by another tool, `q`."""

    def build(root):
        save_tiny("olmoe", root / "source", hidden_size=64, intermediate_size=64)
        options = RefactorOptions(n_sub=2, profile_tokens=256, calibration=replace(tiny_calibration, tokens=512))
        refactor(root / "source", root / "elastic", options)
        strip(root / "elastic", root / "bare")
        quantize(root / "bare", root / "q", "int4")
        quantize(root / "source", root / "q-of-source", "int4")

    return shared("adopt", build)


def strip(folder, target):
    """What another tool sees and writes: the model without what is beside it."""
    target.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith("prism.") and file.name != "README.md":
            (target / file.name).write_bytes(file.read_bytes())


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 35)[None]).logits


def test_what_makes_it_elastic_comes_over_and_the_price_is_measured(pair, tmp_path):
    before = digests(pair / "q")
    done = adopt(pair / "q", pair / "elastic", tmp_path / "out", FEW)
    facts = done.manifest["adopted"]
    assert facts["format"] == "compressed-tensors" and facts["cosine_least"] > 0.9 and facts["cosine_mean"] > 0.99
    assert 0 < facts["kl"] < 0.5 and facts["half_budget_kl"] > 0 and facts["kl_text"] == "evaluation"
    assert digests(pair / "q") == before and moe_prism.verify(tmp_path / "out")
    old, new = Source(pair / "q"), Source(tmp_path / "out")
    assert old.names() == new.names() and old.config() == new.config()
    mine, theirs = side_tensors(tmp_path / "out", 2), side_tensors(pair / "elastic", 2)
    assert mine[0].keys() == theirs[0].keys()
    assert torch.equal(mine[0]["ridge"], theirs[0]["ridge"]) and not torch.equal(mine[0]["cutoffs"], theirs[0]["cutoffs"])
    torch.testing.assert_close(mine[0]["cutoffs"], theirs[0]["cutoffs"], rtol=0.5, atol=0.5)
    model, tokenizer = moe_prism.load(tmp_path / "out")
    plain = load_to_run(pair / "q")
    assert tokenizer is not None
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    assert done.manifest["bytes_per_weight"] < 0.6 and done.manifest["n_sub"] == 2
    assert adopt(pair / "q", pair / "elastic", tmp_path / "out", FEW, resume=True).manifest == done.manifest


def test_a_copy_of_the_source_is_not_taken_for_one_of_the_elastic_folder(pair, tmp_path):
    with pytest.raises(UsageError, match=r"neuron \d+ of expert 0 of '.*' is neuron \d+ of the elastic folder"):
        adopt(pair / "q-of-source", pair / "elastic", tmp_path / "out", FEW)
    assert list(tmp_path.iterdir()) == []


def test_smoothed_norms_and_other_shapes_are_refused(pair, tmp_path):
    strip(pair / "q", tmp_path / "smooth")
    for file in (tmp_path / "smooth").glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t * 1.3 if n.endswith("post_attention_layernorm.weight") else t for n, t in tensors.items()}, file)
    with pytest.raises(UsageError, match=r"post_attention_layernorm.weight' differs .* rescaled"):
        adopt(tmp_path / "smooth", pair / "elastic", tmp_path / "out", FEW)
    save_tiny("olmoe", tmp_path / "other", hidden_size=64, intermediate_size=32)
    with pytest.raises(UsageError, match="the quantized model has"):
        adopt(tmp_path / "other", pair / "elastic", tmp_path / "out", FEW)


def test_a_layer_at_a_time(pair, tmp_path):
    done = adopt(pair / "q", pair / "elastic", tmp_path / "out", replace(FEW, low_memory=True))
    assert "half_budget_kl" not in done.manifest["adopted"] and done.manifest["adopted"]["kl"] > 0


@pytest.mark.skipif(not (find_spec("gguf") and find_spec("accelerate")), reason="needs the packages gguf and accelerate")
@pytest.mark.parametrize("kind", by_night(["Q8_0", "Q4_0"], "Q8_0"))
def test_a_gguf_of_the_elastic_folder(shared, tiny_calibration, kind, tmp_path):
    def build(root):
        save_tiny("qwen3_moe", root / "source", hidden_size=64, moe_intermediate_size=64, head_dim=16)
        options = RefactorOptions(n_sub=2, profile_tokens=0, calibration=replace(tiny_calibration, tokens=512))
        refactor(root / "source", root / "elastic", options)

    elastic = shared("adopt-gguf", build) / "elastic"
    write_gguf(elastic, tmp_path / f"{kind}.gguf", kind)
    done = adopt(tmp_path / f"{kind}.gguf", elastic, options=FEW)
    assert done.folder == tmp_path / f"{kind}-elastic" and moe_prism.verify(done.folder)
    facts = json.loads((done.folder / "prism.json").read_text())
    assert facts["weights_file"] == f"{kind}.gguf" and facts["adopted"]["format"] == "gguf"
    assert facts["bytes_per_weight"] == {"Q8_0": 34 / 32, "Q4_0": 18 / 32}[kind]
    assert 0 < facts["adopted"]["kl"] < {"Q8_0": 0.01, "Q4_0": 1.0}[kind]
    model, tokenizer = moe_prism.load(done.folder)
    plain = load_to_run(done.folder / f"{kind}.gguf")
    assert tokenizer is not None
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="holds a GGUF file"):
        moe_prism.load(done.folder, store=moe_prism.store.StoreOptions(memory=1 << 20))
