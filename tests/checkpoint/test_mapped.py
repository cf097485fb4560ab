"""Experts that lie on disk are those in memory, to the byte, and are written as those."""

from __future__ import annotations

import pytest
import torch

from moe_prism.checkpoint import LayerStream, mapped
from moe_prism.checkpoint.mapped import by_expert, mapped_tensor
from tests.tiny_sources import FAMILIES, save_tiny


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


def test_tensors_are_sorted_by_the_number_that_counts_experts():
    names = [f"layers.3.experts.{e}.w{kind}" for kind in (1, 3) for e in (2, 0, 1)]
    assert by_expert(names, 3) == [[f"layers.3.experts.{e}.w1", f"layers.3.experts.{e}.w3"] for e in range(3)]
    assert by_expert(names, 4) is None and by_expert(names[:-1], 3) is None
    assert by_expert(["layers.0.experts.gate_up_proj"], 4) is None, "all experts in one tensor"


def test_a_disk_without_room_says_so(tmp_path):
    with pytest.raises(OSError, match=r"No space|too large"):
        mapped_tensor(tmp_path, (1 << 50,), torch.uint8)
