"""Streaming equals the model loaded at once, with one layer in memory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_prism.checkpoint import LayerStream
from moe_prism.errors import CorruptError, DoesNotFit, UsageError
from moe_prism.model import find_layers

from .tiny import FAMILIES, IDS, load, save


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_forward_equals_loaded_model(family, tmp_path):
    save(family, tmp_path)
    model = load(tmp_path)
    stream = LayerStream(tmp_path)
    with torch.no_grad(), stream.streaming() as streamed:
        hidden = streamed.get_decoder()(IDS).last_hidden_state
        full = streamed(IDS).logits
        outside = stream.resident_bytes()
    with torch.no_grad():
        assert torch.equal(hidden, model.get_decoder()(IDS).last_hidden_state)
        assert torch.equal(full, model(IDS).logits)
    layers = [sum(p.nbytes for p in model.get_submodule(n).state_dict().values()) for n in stream.layer_names()]
    assert stream.peak_bytes <= outside + max(layers)
    assert outside < stream.peak_bytes
    assert stream.resident_bytes() == 0
    assert stream.unused == []


@pytest.mark.parametrize("family", FAMILIES)
def test_disk_tensors_are_the_files(family, tmp_path):
    save(family, tmp_path)
    stream = LayerStream(tmp_path)
    for prefix in [*stream.layer_names(), *(layer.name for layer in find_layers(stream.model))]:
        with stream.module(prefix, disk_dtype=True):
            found = stream.disk_tensors(prefix)
        assert found.keys() == set(stream.disk_names(prefix)) and found
        for name, tensor in found.items():
            assert torch.equal(tensor, stream.source.tensor(name)), name
    assert stream.resident_bytes() == 0


def test_a_layer_error_leaves_nothing_in_memory(tmp_path):
    save("olmoe", tmp_path)
    stream = LayerStream(tmp_path)
    with pytest.raises(RuntimeError), torch.no_grad(), stream.streaming() as model:
        model.get_submodule(stream.layer_names()[1]).mlp.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
        model(IDS)
    assert stream.resident_bytes() == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_no_memory_for_a_layer_is_said_as_such(error, tmp_path):
    def read(name):
        raise error

    save("olmoe", tmp_path)
    stream = LayerStream(tmp_path, torch.float32)
    with pytest.raises(DoesNotFit, match="not enough memory"):
        stream.materialise(stream.layer_names()[0], read=read)


def test_compute_dtype_and_disk_dtype_are_separate(tmp_path):
    save("olmoe", tmp_path, dtype=torch.bfloat16)
    stream = LayerStream(tmp_path, dtype=torch.float32)
    name = find_layers(stream.model)[0].name
    with stream.module(name) as module:
        assert module.down_proj.dtype == torch.float32
        with pytest.raises(UsageError, match=r"experts\.\d+.*bfloat16"):
            stream.disk_tensors(name)
    with stream.module(name, disk_dtype=True) as module:
        assert module.down_proj.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_narrower_type_are_put_together_in_it(family, tmp_path, monkeypatch):
    save(family, tmp_path, dtype=torch.bfloat16)
    stream, put = LayerStream(tmp_path, dtype=torch.float32), []
    conversion = stream._conversion
    stock = conversion.load

    def load_and_look(*asked):
        stock(*asked)
        names = [conversion.owner[name] for name in asked[0]]
        put.extend(stream.model.get_parameter(name).dtype for name in {n for n in names if names.count(n) > 1})

    monkeypatch.setattr(conversion, "load", load_and_look)
    whole = load(tmp_path).float()
    for name in stream.layer_names():
        with stream.module(name) as module:
            for parameter, found in module.named_parameters():
                assert found.dtype == torch.float32
                assert torch.equal(found, whole.get_parameter(f"{name}.{parameter}"))
    assert set(put) <= {torch.bfloat16} and (put or family != "olmoe")


def test_base_model_checkpoint_without_prefix(tmp_path):
    model = save("olmoe", tmp_path / "full")
    model.model.save_pretrained(tmp_path / "base")
    with pytest.raises(CorruptError, match=r"model\.safetensors: tensor 'lm_head\.weight' is missing"):
        LayerStream(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(file), "lm_head.weight": model.lm_head.weight.detach()}, file)
    stream = LayerStream(tmp_path / "base")
    name = find_layers(stream.model)[0].name
    with stream.module(name, disk_dtype=True):
        assert all(n.startswith("layers.0.") for n in stream.disk_tensors(name))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, UsageError, "quantized"),
        ({"model_type": "nothing_like_it"}, UsageError, "model_type"),
        ({"moe_intermediate_size": 8, "intermediate_size": 8}, CorruptError, r"experts.*is \[.*config.json says"),
        ({"model_type": ["olmoe"]}, CorruptError, "model_type"),
        ({"hidden_size": "wide"}, CorruptError, "'hidden_size' must be a whole number, not 'wide'"),
        ({"rope_parameters": 3}, UsageError, "not a valid configuration"),
        ({"num_hidden_layers": 3}, CorruptError, "is missing"),
    ],
)
def test_config_that_does_not_fit(change, error, words, tmp_path):
    save("olmoe", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=words):
        LayerStream(tmp_path)


def test_hostile_config_runs_nothing(tmp_path):
    save("olmoe", tmp_path)
    path = tmp_path / "config.json"
    hostile = {
        "auto_map": {"AutoConfig": "evil.Evil"},
        "_attn_implementation": "evil/kernel",
        "attn_implementation": "evil/kernel",
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **hostile}))
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    LayerStream(tmp_path)
    path.write_text("{")
    with pytest.raises(CorruptError, match="not JSON"):
        LayerStream(tmp_path)
