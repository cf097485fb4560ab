"""`prune --keep-format`: the experts that stay are the bytes of the quantized source."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from moe_prism.artefact.load import load
from moe_prism.checkpoint import open_source
from moe_prism.errors import UsageError
from moe_prism.jobs.prune import prune_model
from moe_prism.jobs.verify import verify
from moe_prism.methods.prune.select import PruneOptions
from moe_prism.model import load_model
from tests.checkpoint.quantized import FORMS, quantize
from tests.tiers import by_night
from tests.tiny_sources import save_tiny

KEPT = PruneOptions(criterion="last-half", keep_format=True)


COMMIT = ("fp8", "mxfp4", "int4-zeros", "modelopt-nvfp4", "awq")
"""Blocks of floats, one tensor of all experts, packed integers of each side, two scales, packed columns."""


@pytest.fixture(params=by_night(FORMS, *COMMIT))
def folders(request, tmp_path):
    """(quantized, the plain model it stands for)."""
    family = "gpt_oss" if request.param == "mxfp4" else "olmoe"
    save_tiny(family, tmp_path / "plain", hidden_size=64, intermediate_size=64)
    quantize(tmp_path / "plain", tmp_path / "q", request.param, tmp_path / "twin")
    return tmp_path / "q", tmp_path / "twin"


def tensors(folder):
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def logits(folder):
    return load_model(folder, torch.float32)(input_ids=torch.arange(3, 35)[None]).logits


def test_what_stays_is_moved_to_the_byte_and_computes_as_the_plain_model_pruned(folders, tmp_path):
    quantized, twin = folders
    prune_model(quantized, tmp_path / "out", KEPT)
    prune_model(twin, tmp_path / "plain-out", PruneOptions(criterion="last-half"))
    assert verify(tmp_path / "out")
    found, wanted = logits(tmp_path / "out"), logits(tmp_path / "plain-out")
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 5e-6
    old, new = tensors(quantized), tensors(tmp_path / "out")
    stored = open_source(quantized).stored_weights
    seen = 0
    for name, tensor in new.items():
        if ".experts." not in name:
            continue
        e = name.split(".experts.")[1].split(".")[0]
        wanted = old[name.replace(f".experts.{e}.", f".experts.{int(e) + 2}.")] if e.isdecimal() else old[name][2:]
        assert tensor.dtype == wanted.dtype and torch.equal(raw(tensor), raw(wanted))
        seen += 1
    assert seen >= 4 and stored
    settings = "quantization_config"
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())[settings]
        == json.loads((quantized / "config.json").read_text())[settings]
    )


def test_what_cannot_be_kept_is_refused(tiny_source, tmp_path):
    with pytest.raises(UsageError, match="no format to keep"):
        prune_model(tiny_source, tmp_path / "out", KEPT)
    with pytest.raises(UsageError, match="no constants beside quantized"):
        prune_model(tiny_source, tmp_path / "out", PruneOptions(criterion="mone", keep_format=True))
    with pytest.raises(UsageError, match="--dtype writes plain weights"):
        prune_model(tiny_source, tmp_path / "out", PruneOptions(criterion="odd", keep_format=True, dtype="bf16"))


def test_single_experts_that_config_json_names_are_refused(tmp_path):
    save_tiny("olmoe", tmp_path / "plain", hidden_size=64, intermediate_size=64)
    quantize(tmp_path / "plain", tmp_path / "q", "int4")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["model.layers.0.mlp.experts.9.up_proj"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="names single experts"):
        prune_model(tmp_path / "q", tmp_path / "out", KEPT)


def test_an_elastic_folder_in_its_format_stays_so(tmp_path, tiny_calibration):
    from moe_prism.jobs.refactor import RefactorOptions, refactor

    save_tiny("olmoe", tmp_path / "plain", hidden_size=64, intermediate_size=64)
    quantize(tmp_path / "plain", tmp_path / "q", "int4")
    how = RefactorOptions(n_sub=2, profile_tokens=0, calibration=tiny_calibration, keep_format=True)
    refactor(tmp_path / "q", tmp_path / "elastic", how)
    done = prune_model(tmp_path / "elastic", tmp_path / "out", KEPT)
    assert verify(tmp_path / "out") and done.manifest["kept_format"]["format"] == "compressed-tensors"
    assert load(tmp_path / "out")[0].config.num_experts == 2
