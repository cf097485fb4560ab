"""Quantized sources: what is read is what the format's definition says, in memory and streamed, and unknown formats are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_prism.checkpoint import LayerStream, Source, open_source
from moe_prism.checkpoint.companions import companions
from moe_prism.errors import CorruptError, UsageError
from moe_prism.jobs.inspect import inspect_model
from moe_prism.model import load_to_run

from . import quantized, tiny

SIZES = {"hidden_size": 64, "intermediate_size": 32}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    """A folder per family, two layers, several shards."""
    root = tmp_path_factory.mktemp("plain")
    for family in ("olmoe", "gpt_oss"):
        tiny.save(family, root / family, shard="60KB", dtype=torch.bfloat16, **SIZES)
    return {family: root / family for family in ("olmoe", "gpt_oss")}


def build(plain, form: str, root: Path) -> tuple[Path, Path]:
    quantized.quantize(plain["gpt_oss" if form == "mxfp4" else "olmoe"], root / "q", form, root / "twin")
    return root / "q", root / "twin"


@pytest.mark.parametrize("form", quantized.FORMS)
def test_what_is_read_is_what_the_definition_says(plain, form, tmp_path):
    folder, twin = build(plain, form, tmp_path)
    source = open_source(folder)
    meant = {name: t for file in twin.glob("*.safetensors") for name, t in load_file(file).items()}
    assert set(source.names()) == set(meant)
    for name, tensor in meant.items():
        assert source.info(name).shape == tensor.shape
        torch.testing.assert_close(source.tensor(name).float(), tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", quantized.FORMS)
def test_the_model_is_the_dequantized_one_in_memory_and_streamed(plain, form, tmp_path):
    folder, twin = build(plain, form, tmp_path)
    expected = tiny.logits(load_to_run(twin))
    torch.testing.assert_close(tiny.logits(load_to_run(folder)), expected, rtol=1e-6, atol=1e-6)
    stream = LayerStream(folder, torch.float32)
    assert not stream.unused
    with torch.no_grad(), stream.streaming() as model:
        torch.testing.assert_close(tiny.logits(model), expected, rtol=1e-6, atol=1e-6)


def test_inspect_says_how_it_is_stored_and_what_it_stands_for(plain, tmp_path):
    folder, _ = build(plain, "int4", tmp_path)
    facts, bare = inspect_model(folder), inspect_model(plain["olmoe"])
    assert (facts["quantized"], facts["dtype"]) == ("compressed-tensors", "bfloat16")
    assert (facts["parameters"], facts["layers"]) == (bare["parameters"], bare["layers"])
    assert facts["bytes_on_disk"] < bare["bytes_on_disk"] and bare["quantized"] is None


def test_blocks_that_do_not_divide_the_weight(tmp_path):
    made, meant = quantized.fp8(torch.randn(160, 200).numpy(), (128, 128))
    save_file({f"x.{end}": t for end, t in made.items()}, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    torch.testing.assert_close(open_source(tmp_path).tensor("x.weight"), torch.from_numpy(meant), rtol=1e-6, atol=0)


def settings(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": None}, "None"),
        ({"quant_method": "gptq", "bits": 3}, "gptq with 3 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "awq with version 'gemv'"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
)
def test_a_format_that_is_not_read_is_named(plain, changes, named, tmp_path):
    folder, _ = build(plain, "gptq", tmp_path)
    settings(folder, **changes)
    with pytest.raises(UsageError, match=named):
        LayerStream(folder)


def test_act_order_is_refused(plain, tmp_path):
    folder, _ = build(plain, "gptq", tmp_path)
    for file in folder.glob("*.safetensors"):
        save_file({n: t.flip(0) if n.endswith("g_idx") else t for n, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"proj.weight': gptq with act-order"):
        load_to_run(folder)


def test_codes_without_scales_are_refused_before_anything_is_read(plain, tmp_path):
    folder, _ = build(plain, "fp8", tmp_path)
    for file in folder.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if "experts.1.up_proj.weight_scale" not in n}, file, {"format": "pt"})
    quantized._index(folder)
    with pytest.raises(CorruptError, match=r"experts.1.up_proj.weight' is quantized \(F8_E4M3\) and has no scales"):
        LayerStream(folder)


def test_scales_of_another_shape_are_refused(plain, tmp_path):
    folder, _ = build(plain, "fp8", tmp_path)
    settings(folder, weight_block_size=[16, 16])
    with pytest.raises(UsageError, match="has scales of shape"):
        load_to_run(folder)


def test_a_weight_that_is_gone_with_its_scales_is_missed(plain, tmp_path):
    folder, _ = build(plain, "int4", tmp_path)
    for file in folder.glob("*.safetensors"):
        left = {n: t for n, t in load_file(file).items() if ".1.mlp.experts.2.down_proj." not in n}
        save_file(left, file, {"format": "pt"})
    quantized._index(folder)
    with pytest.raises(CorruptError, match=r"'model.layers.1.mlp.experts.2.down_proj.weight' is missing"):
        LayerStream(folder)
    with pytest.raises(CorruptError, match="is missing"):
        load_to_run(folder)


def test_of_two_copies_the_one_that_is_read_counts(plain, tmp_path):
    folder, _ = build(plain, "fp8", tmp_path)
    norm, first = "model.norm.weight", min(folder.glob("*.safetensors"))
    assert Source(folder).info(norm).shard != first.name
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file(load_file(first) | {norm: torch.zeros(3)}, first, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = open_source(folder)
    assert source.info(norm).shape == (64,) and all(t.name != norm for t in source.header(first.name).tensors)
    LayerStream(folder)


def test_files_that_name_the_format_stay_with_it(plain, tmp_path):
    folder, _ = build(plain, "gptq", tmp_path)
    (folder / "quantize_config.json").write_text("{}")
    kept, none = companions(folder, Source(folder))
    assert "quantize_config.json" in kept and not none
    carried, left = companions(folder, open_source(folder))
    assert sorted([*carried, *left]) == kept and left == {"quantize_config.json": "says how the weights were quantized"}


def test_a_type_to_write_is_for_quantized_sources(plain):
    with pytest.raises(UsageError, match="not quantized"):
        open_source(plain["olmoe"], "bf16")
