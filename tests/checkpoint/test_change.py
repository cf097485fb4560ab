"""A change of a finished folder: all or nothing, one at a time, and nothing that the change did not write is vouched for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from moe_prism.checkpoint import OutputFolder, change, changing, put_file, read_manifest, update_manifest, verify, write_manifest
from moe_prism.checkpoint.atomic import held
from moe_prism.errors import CorruptError, UsageError
from tests.tiny_sources import MANIFEST_FACTS, digests


@pytest.fixture
def folder(tmp_path) -> Path:
    with OutputFolder(tmp_path / "out") as out:
        out.write_bytes("README.md", b"card")
        out.write_bytes("ladder.json", b"{}")
        write_manifest(out, MANIFEST_FACTS)
        return out.finish()


def test_a_change_is_seen_when_it_is_committed_and_not_before(folder):
    before = digests(folder)
    with changing(folder) as change:
        (change.work / "ladder.json").write_bytes(b"new")
        assert verify(folder) and {n: d for n, d in digests(folder).items() if not n.startswith(".update")} == before
        change.commit({"pruning": {"n_sub": 8}})
        assert (folder / "ladder.json").read_bytes() == b"new" and read_manifest(folder)["pruning"] == {"n_sub": 8}
    assert verify(folder) and not (folder / ".update").exists() and not folder.with_name("out.lock").exists()


def test_a_change_that_fails_leaves_nothing(folder):
    before = digests(folder)
    with pytest.raises(RuntimeError), changing(folder) as change:
        (change.work / "ladder.json").write_bytes(b"new")
        raise RuntimeError
    assert digests(folder) == before


@pytest.mark.parametrize("renamed", [0, 1])
def test_a_change_that_counts_is_finished_by_whoever_opens_the_folder(folder, renamed, monkeypatch):
    monkeypatch.setattr(change, "_finish", lambda _folder: None)  # killed behind the moment from which it counts
    with changing(folder) as begun:
        (begun.work / "ladder.json").write_bytes(b"new")
        (begun.work / "more.json").write_bytes(b"more")
        begun.commit({})
    monkeypatch.undo()
    if renamed:
        (folder / ".update" / "ladder.json").rename(folder / "ladder.json")
    assert set(read_manifest(folder)["files"]) == {"README.md", "ladder.json", "more.json"}
    assert verify(folder) and (folder / "ladder.json").read_bytes() == b"new" and not (folder / ".update" / "prism.json").exists()


def test_a_change_vouches_for_nothing_else(folder):
    (folder / "README.md").write_bytes(b"edited")
    put_file(folder / "ladder.json", b"new")
    with pytest.raises(CorruptError, match=r"README\.md"):
        verify(folder)
    (folder / "README.md").unlink()
    update_manifest(folder, {})
    with pytest.raises(CorruptError, match=r"README\.md is missing"):
        verify(folder)


def test_what_is_measured_again_may_be_removed(folder):
    (folder / "ladder.json").unlink()
    update_manifest(folder, {})
    assert verify(folder) and "ladder.json" not in read_manifest(folder)["files"]


def test_one_change_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(change, "PATIENCE", 0.1)
    with held(folder, 0), pytest.raises(UsageError, match=f"pid {os.getpid()}"):
        put_file(folder / "ladder.json", b"new")


@pytest.mark.parametrize("what", ["a link", "a file outside the list", "a folder that is a link", "no manifest"])
def test_work_that_somebody_else_left_is_not_taken_in(folder, what, tmp_path):
    work = folder / ".update"
    (tmp_path / "secret").write_text("secret")
    if what == "a folder that is a link":
        (tmp_path / "elsewhere").mkdir()
        work.symlink_to(tmp_path / "elsewhere")
    else:
        work.mkdir()
    shutil.copyfile(folder / "prism.json", work / "prism.json")
    if what == "a link":
        (work / "ladder.json").symlink_to(tmp_path / "secret")
    elif what == "a file outside the list":
        (work / "config.json").write_text("{}")
    elif what == "no manifest":
        (work / "prism.json").write_text(json.dumps({}))
    with pytest.raises(CorruptError):
        read_manifest(folder)
    assert not (folder / "config.json").exists() and (folder / "ladder.json").read_text() == "{}"
