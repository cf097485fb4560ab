"""Output is complete or absent; locks, resume, manifests."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_prism.checkpoint import (
    Journal,
    OutputFolder,
    read_manifest,
    sha256_file,
    source_facts,
    update_manifest,
    verify,
    write_manifest,
)
from moe_prism.checkpoint.manifest import MANIFEST
from moe_prism.errors import CorruptError, DoesNotFit, UsageError
from tests.tiny_sources import MANIFEST_FACTS


def build(path, text=b"new", force=False, resume=False):
    with OutputFolder(path, force=force, resume=resume) as out:
        out.write_bytes("config.json", text)
        out.save_tensors(
            "prism.safetensors", {"scale": torch.arange(4.0), "ids": torch.tensor([1], dtype=torch.int32)}, {"b": "2", "a": "1"}
        )
        write_manifest(out, MANIFEST_FACTS)
        return out.finish()


def test_nothing_is_visible_before_finish(tmp_path):
    target = tmp_path / "deep" / "out"
    with OutputFolder(target) as out:
        digest = out.write_bytes("config.json", b"{}")
        assert digest == sha256_file(out.work / "config.json")
        assert not target.exists()
    assert out.work.is_dir() and not target.exists()
    assert build(target, resume=True) == target
    assert sorted(p.name for p in target.parent.iterdir()) == ["out"]


def test_save_tensors_is_readable_and_repeatable(tmp_path):
    tensors = {
        "z": torch.randn(3, 2).t(),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "n": torch.tensor(5),
        "none": torch.empty(0, 2),
    }
    with OutputFolder(tmp_path / "out") as out:
        first = out.save_tensors("a.safetensors", tensors, {"k": "v", "format": "pt"})
        second = out.save_tensors("b.safetensors", dict(reversed(tensors.items())), {"format": "pt", "k": "v"})
        assert first == second
        found = load_file(out.work / "a.safetensors")
        assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
        with safe_open(out.work / "a.safetensors", "pt") as file:
            assert file.metadata() == {"k": "v", "format": "pt"}
        with pytest.raises(CorruptError, match="'bad' holds nan"):
            out.save_tensors("c.safetensors", {"bad": torch.tensor([0.0, float("nan")])})
        assert not (out.work / "c.safetensors").exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../../b", "a/b/c/d/e", "", "..", "a\0b"])
def test_file_names_stay_inside(name, tmp_path):
    with OutputFolder(tmp_path / "out") as out, pytest.raises(UsageError, match="not a file name"):
        out.write_bytes(name, b"")


def test_existing_output_needs_force(tmp_path):
    target = build(tmp_path / "out", b"old")
    with pytest.raises(UsageError, match="--force"):
        OutputFolder(target)
    build(target, b"new", force=True)
    assert (target / "config.json").read_bytes() == b"new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_force_keeps_the_old_output_until_success(tmp_path):
    target = build(tmp_path / "out", b"old")
    with pytest.raises(RuntimeError), OutputFolder(target, force=True) as out:
        out.write_bytes("config.json", b"new")
        raise RuntimeError
    assert (target / "config.json").read_bytes() == b"old"


def test_force_never_removes_other_folders(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(build(tmp_path / "model"))
    for name in ("photos", "file", "link"):
        with pytest.raises(UsageError, match="will not be replaced"):
            OutputFolder(tmp_path / name, force=True)
    assert (tmp_path / "photos" / "cat.jpg").exists() and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("fail_at", [1, 2])
def test_f02_kill_between_the_renames(fail_at, tmp_path, monkeypatch):
    target = build(tmp_path / "out", b"old")
    real, count = type(target).rename, iter(range(1, 9))

    def rename(self, other):
        if self.name.startswith("out") and next(count) == fail_at:
            raise KeyboardInterrupt
        return real(self, other)

    out = OutputFolder(target, force=True)
    out.write_bytes("config.json", b"new")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), out:
        patch.setattr(type(target), "rename", rename)
        out.finish()
    with pytest.raises(UsageError, match="--force"):
        OutputFolder(target)
    assert (target / "config.json").read_bytes() == b"old"
    build(target, b"new", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_f05_orphans_are_swept_and_partial_work_needs_a_word(tmp_path):
    with OutputFolder(tmp_path / "out") as out:
        out.write_bytes("config.json", b"{}")
    (out.work / "model.safetensors.tmp123").write_bytes(b"half")
    with pytest.raises(UsageError, match=r"--resume.*--force"):
        OutputFolder(tmp_path / "out")
    with OutputFolder(tmp_path / "out", resume=True) as out:
        assert [p.name for p in out.work.iterdir()] == ["config.json"]
    with OutputFolder(tmp_path / "out", force=True) as out:
        assert not list(out.work.iterdir())


def test_f04_disk_full(tmp_path, monkeypatch):
    with OutputFolder(tmp_path / "out") as out:
        out.write_bytes("kept", b"1")
        with pytest.raises(DoesNotFit, match="disk full"), out.stage("lost") as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "full")
        assert [p.name for p in out.work.iterdir()] == ["kept"]
        with pytest.raises(DoesNotFit, match="are needed"):
            out.require_space(1 << 60)


def test_f10_second_run_is_told_the_pid(tmp_path):
    with OutputFolder(tmp_path / "out"):
        with pytest.raises(UsageError, match=f"pid {os.getpid()}"):
            OutputFolder(tmp_path / "out", resume=True)
        child = os.fork()
        if child == 0:
            try:
                OutputFolder(tmp_path / "out", resume=True)
            except UsageError as error:
                os._exit(2 if f"pid {os.getppid()}" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    (tmp_path / "out.lock").write_text("999999")  # left by a kill: held by no one
    with OutputFolder(tmp_path / "out", resume=True):
        pass
    assert not (tmp_path / "out.lock").exists()


def test_f14_journal_resumes_by_fingerprint_and_hash(tmp_path):
    facts = {"source": {"a": "1"}, "seed": 1, "n": (1, 2)}
    journal = Journal(tmp_path, facts)
    for unit in ("one", "two", "three"):
        (tmp_path / unit).write_text(unit)
        journal.finish(unit, sha256_file(tmp_path / unit))
    (tmp_path / "two").write_text("changed")
    (tmp_path / "three").unlink()
    again = Journal(tmp_path, facts)
    assert [again.done(unit) for unit in ("one", "two", "three", "four")] == [True, False, False, False]
    assert again.units() == ["one", "two", "three"] or set(again.units()) == {"one", "two", "three"}
    with pytest.raises(UsageError, match=r"another seed: 1 then, 2 now"):
        Journal(tmp_path, {**facts, "seed": 2})
    with pytest.raises(UsageError, match=r"another extra: None then, 'x' now"):
        Journal(tmp_path, {**facts, "extra": "x"})


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"fingerprint": {}, "units": {"../x": "%064d"}}' % 0, b"[" * 99999]
)
def test_a_damaged_journal_is_said(content, tmp_path):
    (tmp_path / "journal.json").write_bytes(content)
    with pytest.raises(CorruptError, match="--force"):
        Journal(tmp_path, {})


def test_verify_accepts_what_was_built(tmp_path):
    target = build(tmp_path / "out")
    manifest = read_manifest(target)
    assert (
        manifest["schema"] == 1
        and manifest["pruning"] == {"n_sub": 4}
        and set(manifest["files"]) == {"config.json", "prism.safetensors"}
    )
    assert [check.name for check in verify(target)] == ["manifest", "files", "headers", "values"]
    (target / "README.md").write_text("card")
    with pytest.raises(CorruptError, match=r"README\.md is not in prism\.json"):
        verify(target)
    update_manifest(target, {"pruning": {"n_sub": 8}})
    assert verify(target) and read_manifest(target)["pruning"] == {"n_sub": 8}
    with pytest.raises(CorruptError, match="'points' is not known"):
        update_manifest(target, {"points": [1, 2]})
    with pytest.raises(UsageError, match="may not set"):
        update_manifest(target, {"files": {}})


def test_verify_names_what_is_wrong(tmp_path):
    target = build(tmp_path / "out")
    (target / "config.json").unlink()
    (target / "other.bin").write_bytes(b"")
    (target / "prism.safetensors").write_bytes((target / "prism.safetensors").read_bytes()[:-1])
    with pytest.raises(
        CorruptError, match=r"config\.json is missing; other\.bin is not in .*prism\.safetensors has \d+ bytes instead"
    ):
        verify(target)
    with pytest.raises(UsageError, match=r"no prism\.json"):
        verify(tmp_path)


def test_an_edited_manifest_is_found(tmp_path):
    target = build(tmp_path / "out")
    text = (target / MANIFEST).read_text()
    (target / MANIFEST).write_text(text.replace('"n_sub": 4', '"n_sub": 8'))
    with pytest.raises(CorruptError, match="edited or damaged"):
        verify(target)
    for bad in ("", "[]", "{}", '{"files": []}', '{"files": {"../x": {"sha256": "", "bytes": 0}}}', "null"):
        (target / MANIFEST).write_text(bad)
        with pytest.raises(CorruptError, match=r"prism\.json"):
            verify(target)


def test_f08_values_that_are_not_finite_are_found_even_with_good_hashes(tmp_path):
    with OutputFolder(tmp_path / "out") as out:
        save_file({"w": torch.tensor([1.0, float("inf")])}, out.work / "model.safetensors")
        write_manifest(out, MANIFEST_FACTS)
        out.finish()
    with pytest.raises(CorruptError, match=r"tensor 'w' holds inf at \[1\]"):
        verify(tmp_path / "out")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0), bit=st.integers(0, 7), name=st.sampled_from(["config.json", "prism.safetensors"]))
def test_f07_one_flipped_bit_is_found(position, bit, name, tmp_path):
    target = tmp_path / "out"
    if not target.exists():
        build(target)
    path = target / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[position % len(bad)] ^= 1 << bit
    path.write_bytes(bytes(bad))
    try:
        with pytest.raises(CorruptError, match=name):
            verify(target)
    finally:
        path.write_bytes(good)


def test_source_facts_name_no_path(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    facts = source_facts(tmp_path)
    assert facts["name"] == tmp_path.name and set(facts["files"]) == {"config.json", "model.safetensors"}
    assert str(tmp_path.parent) not in json.dumps(facts)
    assert source_facts(tmp_path / "config.json")["files"] == {"config.json": facts["files"]["config.json"]}
