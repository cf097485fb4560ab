"""The packed file: records are the weights, damage and staleness are refused."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.artefact.load import load
from moe_prism.checkpoint import read_manifest, update_manifest, verify
from moe_prism.errors import CorruptError, DoesNotFit, UsageError
from moe_prism.store import StoreOptions, open_pack, parse_bytes, write_pack
from moe_prism.store.arena import slots_in
from moe_prism.store.checksum import checksum
from moe_prism.store.layout import DTYPES, RecordLayout


@pytest.fixture
def packed(elastic_tiny, tmp_path):
    """(folder, file, manifest)"""
    manifest = read_manifest(elastic_tiny)
    write_pack(elastic_tiny, tmp_path / "p", manifest, low=True)
    return elastic_tiny, tmp_path / "p", manifest


def test_every_record_is_the_weights_of_its_sub_expert(packed):
    folder, file, manifest = packed
    pack = open_pack(file, manifest)
    data = file.read_bytes()
    model, _ = load(folder)
    block = pack.layout.block
    for number, elastic in enumerate(model._moe_prism.layers):
        layer = elastic.parts.layer
        for expert in range(layer.num_experts):
            for part in range(manifest["n_sub"]):
                at = pack.place(pack.space.key(number, expert, part), False)
                assert at % 4096 == 0
                record = torch.frombuffer(bytearray(data[at : at + pack.layout.bytes]), dtype=pack.layout.torch_dtype)
                own = slice(part * block, (part + 1) * block)
                wanted = [layer.gate[expert, own], layer.up[expert, own], layer.down[expert, :, own].T]
                assert torch.equal(record[: pack.layout.weights].float(), torch.cat([w.reshape(-1) for w in wanted]))


def test_same_model_same_bytes_and_nothing_else_is_left(packed, tmp_path):
    folder, file, manifest = packed
    write_pack(folder, tmp_path / "again", manifest, low=True)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "p"]


def test_a_file_of_other_weights_is_refused(packed):
    _, file, manifest = packed
    other = json.loads(json.dumps(manifest))
    name = next(n for n in other["files"] if n.startswith("model"))
    other["files"][name]["sha256"] = "0" * 64
    with pytest.raises(CorruptError, match="other weights"):
        open_pack(file, other)


@pytest.mark.parametrize(("at", "what"), [(0, "no packed file"), (60, "damaged header"), (4096, "damaged tables")])
def test_damage_before_the_records_is_found_at_once(packed, at, what):
    _, file, manifest = packed
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match=what):
        open_pack(file, manifest)


def test_a_file_cut_short_is_found_at_once(packed):
    _, file, manifest = packed
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(CorruptError, match="bytes instead of"):
        open_pack(file, manifest)


def test_f04_a_full_disk_leaves_nothing(elastic_tiny, tmp_path):
    with pytest.raises(DoesNotFit, match="cannot write"):
        write_pack(elastic_tiny, tmp_path / "no" / "p", read_manifest(elastic_tiny))
    assert list(tmp_path.iterdir()) == []


def test_on_first_use_it_becomes_part_of_the_folder(elastic_tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(elastic_tiny, folder)
    load(folder, store=StoreOptions(1 << 30))
    assert (folder / "experts.pack").is_file()
    verify(folder)
    stamp = (folder / "experts.pack").stat().st_mtime_ns
    load(folder, store=StoreOptions(1 << 30))
    assert (folder / "experts.pack").stat().st_mtime_ns == stamp


def test_verify_checks_it_and_does_not_miss_it(elastic_tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(elastic_tiny, folder)
    load(folder, store=StoreOptions(1 << 30))
    update_manifest(folder, {"operating_points": []})  # as `frontier` does: every file is listed again
    file = folder / "experts.pack"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptError, match=r"experts\.pack was changed"):
        verify(folder)
    file.unlink()
    files = next(check for check in verify(folder) if check.name == "files")
    assert files.detail.startswith(f"{len(list(folder.iterdir())) - 1} files")  # prism.json does not list itself
    (folder / "prism.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"prism\.safetensors is missing"):
        verify(folder)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.sampled_from(sorted(DTYPES)), st.integers(0, 9))
def test_int8_form_is_within_half_a_step(hidden, block, has_gate, has_bias, dtype, seed):
    layout = RecordLayout(hidden, block, has_gate, has_bias, dtype)
    torch.manual_seed(seed)
    numbers = torch.randn(2, layout.weights + layout.biases).to(layout.torch_dtype)
    records = torch.nn.functional.pad(numbers.view(torch.uint8), (0, layout.bytes - numbers.shape[1] * layout.item))
    lowered = layout.lowered(records)
    assert lowered.shape == (2, layout.low_bytes)
    if layout.low_bytes > layout.bytes:  # padding: nothing to gain, and no room to widen in place
        return
    for record, low, wanted in zip(records, lowered, numbers, strict=True):
        slot = torch.full_like(record, 255)
        slot[layout.bytes - layout.low_bytes :] = low
        layout.raise_(slot)
        found = slot[: numbers.shape[1] * layout.item].view(layout.torch_dtype)
        rows, truth = found[: layout.weights].float().view(-1, hidden), wanted[: layout.weights].float().view(-1, hidden)
        step = truth.abs().amax(1, keepdim=True) / 127
        assert ((rows - truth).abs() <= 0.5 * step + 0.01 * truth.abs().amax(1, keepdim=True)).all()
        assert torch.equal(found[layout.weights :], wanted[layout.weights :])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.data())
def test_checksum_changes_with_every_byte(units, data):
    words = np.frombuffer(data.draw(st.binary(min_size=64 * units, max_size=64 * units)), np.uint64).copy()
    before = checksum(words)
    position, bit = data.draw(st.integers(0, 64 * units - 1)), data.draw(st.integers(0, 7))
    words.view(np.uint8)[position] ^= np.uint8(1 << bit)
    assert checksum(words) != before


@pytest.mark.parametrize(("text", "size"), [("200MB", 200_000_000), ("1.5 GiB", 3 << 29), ("65536", 65536), ("8kB", 8000)])
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1 apple", "nan"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(UsageError, match="no amount of memory"):
        parse_bytes(text)


def test_too_little_memory_says_how_much_is_needed():
    layout = RecordLayout(32, 4, True, False, "float32")
    assert slots_in(100 + layout.bytes, 100, layout.bytes, 9) == 1
    with pytest.raises(DoesNotFit, match=f"give at least {100 + layout.bytes}"):
        slots_in(99 + layout.bytes, 100, layout.bytes, 9)
