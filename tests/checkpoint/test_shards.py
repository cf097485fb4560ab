"""Damaged checkpoints are refused before any tensor is used, by name, quickly and in little memory."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_prism.checkpoint import Source, first_non_finite, read_header
from moe_prism.errors import CorruptError, UsageError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.zeros(0, 5),
    "d": torch.tensor(7),
}
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, payload=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)


def sharded(folder, tensors=TENSORS):
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: shard for shard, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_reads_what_was_written(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    source = Source(tmp_path)
    assert sorted(source.names()) == sorted(TENSORS) and source.shards() == ["model.safetensors"]
    assert source.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert source.header("model.safetensors").metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert torch.equal(source.tensor(name), tensor) and source.info(name).shape == tuple(tensor.shape)
    source.tensor("a").zero_()
    assert torch.equal(source.tensor("a"), TENSORS["a"])
    with pytest.raises(UsageError, match="no tensor 'z'"):
        source.info("z")


def test_reads_shards(tmp_path):
    sharded(tmp_path)
    source = Source(tmp_path)
    assert len(source.shards()) == 2 and all(torch.equal(source.tensor(n), t) for n, t in TENSORS.items())


HEADERS = {
    "size beyond file": (b"{}", b"", 2**40, "byte 0"),
    "size of all ones": (b"{}", b"", 2**64 - 1, "byte 0"),
    "size beyond limit": (b"{}", b"", 100_000_001, "byte 0"),
    "not json": (b"not json", b"", None, "byte 8"),
    "not utf-8": (b'{"\xff": 1}', b"", None, "byte 8"),
    "a list": (b"[]", b"", None, "byte 8"),
    "deep nesting": (b"[" * 100_000, b"", None, "byte 8"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", b"", None, "byte 8"),
    "duplicate name": (b'{"a": {}, "a": {}}', b"", None, "appears twice"),
    "lone surrogate": (b'{"\\ud800": {}}', b"", None, "byte 8"),
    "metadata not strings": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "entry not an object": ({"a": 3}, b"", None, "tensor 'a'"),
    "extra key": ({"a": {**GOOD, "x": 1}}, b"\0" * 8, None, "tensor 'a'"),
    "unknown dtype": ({"a": {**GOOD, "dtype": "F99"}}, b"\0" * 8, None, "unknown dtype"),
    "dtype not text": ({"a": {**GOOD, "dtype": ["F32"]}}, b"\0" * 8, None, "unknown dtype"),
    "negative shape": ({"a": {**GOOD, "shape": [-2]}}, b"\0" * 8, None, "not lists of sizes"),
    "boolean shape": ({"a": {**GOOD, "shape": [True, 2]}}, b"\0" * 8, None, "not lists of sizes"),
    "overflowing shape": ({"a": {**GOOD, "shape": [2**62, 2**62]}}, b"\0" * 8, None, "overflows"),
    "shape against offsets": ({"a": {**GOOD, "shape": [3]}}, b"\0" * 8, None, "needs 12 bytes"),
    "reversed offsets": ({"a": {**GOOD, "data_offsets": [8, 0]}}, b"\0" * 8, None, "not lists of sizes"),
    "overlap": ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, b"\0" * 12, None, "'b' overlaps"),
    "gap": ({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 20]}}, b"\0" * 20, None, "'b' leaves a gap"),
    "first byte unused": ({"a": {**GOOD, "data_offsets": [4, 12]}}, b"\0" * 12, None, "leaves a gap"),
    "truncated": ({"a": GOOD}, b"\0" * 7, None, "the file has"),
    "bytes left over": ({"a": GOOD}, b"\0" * 9, None, "the file has"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_f06_damaged_header(case, tmp_path):
    header, payload, length, words = HEADERS[case]
    write(tmp_path / "model.safetensors", header, payload, length)
    tracemalloc.start()
    with pytest.raises(CorruptError, match=r"model\.safetensors") as caught:
        Source(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in str(caught.value)
    assert peak < 8_000_000


@pytest.mark.parametrize("size", range(12))
def test_f06_short_file(size, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(((2).to_bytes(8, "little") + b"{}xx")[:size])
    if size != 10:
        with pytest.raises(CorruptError):
            Source(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_f06_any_header_damage_is_a_corrupt_error(data, tmp_path):
    folder = tmp_path / "model"
    sharded(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    original = read_header(shard)
    at = data.draw(st.integers(0, original.data_start - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    shard.write_bytes(bytes(content[:cut]))
    try:
        source = Source(folder)
    except CorruptError:
        return
    # What may pass changes no name and no place (free text, a dtype of the same size): that is what `verify` has sha256 for.
    places = [[(t.name, t.begin, t.end) for t in header.tensors] for header in (source.header(shard.name), original)]
    assert places[0] == places[1]


@pytest.mark.parametrize(
    "target", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "a\0.safetensors", "x.bin", 3, None]
)
def test_f06_index_that_leads_out(target, tmp_path):
    index = sharded(tmp_path)
    index["weight_map"]["a"] = target
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match=r"index\.json: (tensor 'a'|'weight_map\.a')"):
        Source(tmp_path)


def test_f06_link_that_leads_out(tmp_path, monkeypatch):
    sharded(tmp_path / "model")
    shard = tmp_path / "model" / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"safety rule.*--follow-links"):
        Source(tmp_path / "model")
    monkeypatch.setenv("MOE_PRISM_FOLLOW_LINKS", "1")
    assert sorted(Source(tmp_path / "model").names()) == sorted(TENSORS)


def test_hub_cache_links_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "rev", tmp_path / "blobs"
    sharded(snapshot)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"{i}")
        file.symlink_to(f"../../blobs/{i}")
    assert sorted(Source(snapshot).names()) == sorted(TENSORS)


def test_f06_index_and_shards_disagree(tmp_path):
    index = sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    cases = [
        ({**index["weight_map"], "z": "model-00001-of-00002.safetensors"}, "tensor 'z' is not in"),
        ({k: v for k, v in index["weight_map"].items() if k != "a"}, "tensor 'a' is not in the index"),
        ({**index["weight_map"], "a": "model-00003-of-00003.safetensors"}, "missing"),
        ({k: v for k, v in index["weight_map"].items() if v.startswith("model-00001")}, "not in the index"),
        ({}, "'weight_map' must have at least 1 item"),
        ([], "'weight_map' must be an object"),
    ]
    for weight_map, words in cases:
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CorruptError, match=words):
            Source(tmp_path)
    path.write_text("{")
    with pytest.raises(CorruptError, match="is not JSON"):
        Source(tmp_path)


def test_a_shard_laid_over_others_is_read_as_transformers_reads_it(tmp_path):
    """Of two copies transformers takes the one in the file that sorts last; an index that names the other is ambiguous."""
    index = sharded(tmp_path)
    save_file({"a": TENSORS["a"] * 2}, tmp_path / "model-overlay.safetensors")
    old = index["weight_map"]["a"]
    index["weight_map"]["a"] = "model-overlay.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Source(tmp_path)
    assert torch.equal(source.tensor("a"), TENSORS["a"] * 2)
    assert [source.is_read(info) for shard in source.shards() for info in source.header(shard).tensors if info.name == "a"] == [
        False,
        True,
    ]
    index["weight_map"] |= {"a": old, "over": "model-overlay.safetensors"}
    save_file({"a": TENSORS["a"] * 2, "over": torch.ones(1)}, tmp_path / "model-overlay.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptError, match=r"tensor 'a', of which transformers reads the copy in model-overlay"):
        Source(tmp_path)


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        Source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UsageError, match=r"pickle.*save_pretrained"):
        Source(tmp_path)
    with pytest.raises(UsageError, match="not a folder"):
        Source(tmp_path / "pytorch_model.bin")


def test_a_file_cut_after_opening(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = Source(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-30])
    with pytest.raises(CorruptError, match="cut short"):
        for name in source.names():
            source.tensor(name)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2, torch.float8_e4m3fn]
)
def test_first_non_finite(dtype):
    tensor = torch.ones(3, 5).to(dtype)
    assert first_non_finite(tensor) is None
    values = tensor.float()
    values[1, 2] = float("nan")
    assert first_non_finite(values.to(dtype)) == 7


def test_first_non_finite_looks_at_every_chunk(monkeypatch):
    monkeypatch.setattr("moe_prism.checkpoint.tensors.CHUNK", 4)
    tensor = torch.ones(11)
    tensor[9] = float("inf")
    assert first_non_finite(tensor) == 9
    assert first_non_finite(torch.arange(5)) is None and first_non_finite(torch.empty(0)) is None
