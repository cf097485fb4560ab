"""Experts that lie on disk are those in memory, to the byte, and are written as those."""

from __future__ import annotations

import pytest
import torch

from moe_prism.checkpoint import LayerStream, mapped
from moe_prism.checkpoint.mapped import by_expert, mapped_tensor
from tests.tiny_sources import FAMILIES, save_tiny

from . import quantized


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("disk_dtype", [False, True])
def test_a_layer_on_disk_is_the_layer_in_memory(family, disk_dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "TOGETHER", 3)
    save_tiny(family, tmp_path / "source")
    plain, other = (LayerStream(tmp_path / "source", torch.float32) for _ in range(2))
    other.room = tmp_path
    for name in plain.layer_names():
        with plain.module(name, disk_dtype=disk_dtype), other.module(name, disk_dtype=disk_dtype):
            one, two = plain.state(name), other.state(name)
            assert one.keys() == two.keys()
            assert all(one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one)
            if disk_dtype:
                found = {}
                for part in other.disk_parts(name):
                    assert all(torch.equal(own, part.stored(other.source, key)) for key, own in part.tensors.items())
                    for key, own in part.tensors.items():
                        found[key] = own if not part.first else torch.cat([found[key], own])
                files = plain.disk_tensors(name)
                assert found.keys() == files.keys() and all(torch.equal(found[key], files[key]) for key in files)
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing is left"


@pytest.mark.parametrize("quantizes", [False, True])
def test_a_few_experts_are_sliced_out_of_one_tensor(quantizes, tmp_path, monkeypatch):
    """gpt-oss, as it is and in MXFP4: no tensor of all experts is ever read as a whole."""
    monkeypatch.setattr(mapped, "TOGETHER", 3)
    folder = tmp_path / "plain"
    save_tiny("gpt_oss", folder, hidden_size=64, intermediate_size=32)
    if quantizes:
        quantized.quantize(folder, folder := tmp_path / "coded", "mxfp4")
    plain, other = (LayerStream(folder, torch.float32) for _ in range(2))
    other.room = tmp_path
    stacked = [name for name in plain.source.names() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert stacked and all(other.source.has_rows(name) for name in stacked)
    for name in stacked:
        whole = plain.source.tensor(name)
        assert torch.equal(plain.source.rows(name, 1, 3), whole[1:3])
        assert torch.equal(torch.cat([rows for _, rows in plain.source.parts(name)]), whole)
    read = []
    for source in {other.source, getattr(other.source, "raw", other.source)}:
        monkeypatch.setattr(source, "tensor", lambda name, take=source.tensor: read.append(name) or take(name))
    for name in plain.layer_names():
        assert other.can_map(name)
        with plain.module(name), other.module(name):
            one, two = plain.state(name), other.state(name)
            assert all(torch.equal(one[key], two[key]) for key in one)
    assert read and not [name for name in read if "experts" in name and "bias" not in name]


def test_a_trial_reads_a_few_experts_and_has_as_many_as_the_layer(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "source", num_experts=16)
    plain, trial = (LayerStream(tmp_path / "source", torch.float32) for _ in range(2))
    trial.is_trial = True
    name = plain.layer_names()[0]
    with plain.module(name), trial.module(name):
        for key, tensor in plain.state(name).items():
            found = trial.state(name)[key]
            assert found.shape == tensor.shape
            if tensor.ndim == 3:
                assert found.stride(0) == 0 and torch.equal(found[9], tensor[0])
            else:
                assert torch.equal(found, tensor)


def test_tensors_are_sorted_by_the_number_that_counts_experts():
    names = [f"layers.3.experts.{e}.w{kind}" for kind in (1, 3) for e in (2, 0, 1)]
    assert by_expert(names, 3) == [[f"layers.3.experts.{e}.w1", f"layers.3.experts.{e}.w3"] for e in range(3)]
    assert by_expert(names, 4) is None and by_expert(names[:-1], 3) is None
    assert by_expert(["layers.0.experts.gate_up_proj"], 4) is None, "all experts in one tensor"


def test_a_disk_without_room_says_so(tmp_path):
    with pytest.raises(OSError, match=r"No space|too large"):
        mapped_tensor(tmp_path, (1 << 50,), torch.uint8)
