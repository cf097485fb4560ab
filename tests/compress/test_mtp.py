"""Layers for multi-token prediction, which transformers does not build: pruned alike, dropped, kept whole or asked about."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_prism import cli
from moe_prism.checkpoint import update_manifest
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.prune import prune_model
from moe_prism.jobs.verify import verify
from moe_prism.model import load_model
from moe_prism.options.prune import PruneOptions
from tests.checkpoint.quantized import quantize

from .tiny import build

OPTIONS = PruneOptions(criterion="first-half", keep=0.5)


def deepseek(tensors):
    """DeepSeek-V3's form: a layer after the last one."""
    return {n.replace("layers.2.", "layers.3."): v * 1.5 for n, v in tensors.items() if "layers.2." in n} | {
        "model.layers.3.eh_proj.weight": torch.randn(32, 64),
        "model.layers.3.shared_head.head.weight": torch.randn(64, 32),
    }


def named(tensors):
    """The form of Qwen3-Next and Qwen3.5: a module of its own."""
    return {n.replace("model.layers.1.", "mtp.layers.0."): v * 1.5 for n, v in tensors.items() if "layers.1." in n} | {
        "mtp.fc.weight": torch.randn(32, 64)
    }


KINDS = {"deepseek": ("group-sigmoid", deepseek, "model.layers.3."), "named": ("softmax-normalised", named, "mtp.layers.0."),
         "transposed": ("router-bias", named, "mtp.layers.0.")}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    kind, more, layer = KINDS[request.param]
    folder = tmp_path_factory.mktemp("mtp") / "source"
    build(kind).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | more(tensors), file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return folder, layer


def test_pruning_asks_before_it_starts(source, tmp_path, capsys):
    folder, layer = source
    assert cli.main(["prune", str(folder), "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("layers.3" if "3" in layer else "mtp") in err and "--mtp prune" in err
    assert not list(tmp_path.iterdir())


def test_pruned_alike(source, tmp_path):
    """The layer that is not run has the same shapes and the same experts by number as the last one: what pruning a copy would give."""
    folder, layer = source
    done = prune_model(folder, tmp_path / "out", replace(OPTIONS, mtp="prune"))
    out, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    last = {name: name.replace(layer, _last(layer, before)) for name in out if name.startswith(layer)}
    twins = {name: like for name, like in last.items() if like in out}
    assert len(twins) > 3
    for name, like in twins.items():  # the tiny layer is the last one times 1.5
        assert torch.equal(out[name], out[like] * 1.5), name
    others = [name for name in before if name.startswith(layer) and name not in out]
    assert all("experts" in name for name in others)
    assert len(done.selection.choices[-1].kept) * 2 == done.selection.choices[-1].experts
    assert any("has the same shapes" in check.detail for check in verify(tmp_path / "out"))
    load_model(tmp_path / "out")


def test_of_a_quantized_source_it_is_pruned_as_what_it_stands_for(source, tmp_path):
    quantize(source[0], tmp_path / "q", "fp8", tmp_path / "twin")
    prune_model(tmp_path / "q", tmp_path / "out", replace(OPTIONS, mtp="prune", dtype="fp32"))
    prune_model(tmp_path / "twin", tmp_path / "plain", replace(OPTIONS, mtp="prune"))
    ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert ours.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(ours[name].float(), tensor, rtol=1e-6, atol=1e-9)
    verify(tmp_path / "out")


def _last(layer, tensors):
    return "model.layers.2." if layer == "model.layers.3." else "model.layers.1."


def test_dropped(source, tmp_path):
    folder, layer = source
    prune_model(folder, tmp_path / "out", replace(OPTIONS, mtp="drop"))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in out if name.startswith((layer, "mtp."))]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    verify(tmp_path / "out")


def test_kept_whole(source, tmp_path):
    folder, layer = source
    prune_model(folder, tmp_path / "out", replace(OPTIONS, mtp="keep"))
    out, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(out[name], before[name]) for name in before if name.startswith(layer))
    assert any("kept whole, as asked" in check.detail for check in verify(tmp_path / "out"))


def test_verify_sees_a_layer_that_was_left_behind(source, tmp_path):
    """What version 0.1 wrote: the config says the new number of experts, this layer still holds the old one."""
    folder, _ = source
    prune_model(folder, tmp_path / "out", replace(OPTIONS, mtp="keep"))
    old = json.loads((tmp_path / "out" / "prism.json").read_text())["pruning"]
    update_manifest(tmp_path / "out", {"pruning": {**old, "options": {**old["options"], "mtp": None}}})
    with pytest.raises(CorruptError, match="of an MTP layer"):
        verify(tmp_path / "out")


def test_a_broken_one_is_not_pruned(source, tmp_path):
    folder, layer = source
    copy = shutil.copytree(folder, tmp_path / "source")
    tensors = load_file(copy / "model.safetensors")
    gone = [name for name in tensors if name.startswith(layer) and ("experts.2." in name or "experts.down" in name)]
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in gone}, copy / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises((CorruptError, UsageError), match="MTP layer"):
        prune_model(copy, tmp_path / "out", replace(OPTIONS, mtp="prune"))
    assert not (tmp_path / "out").exists()
