"""Folders of text: data sets as downloaded or saved, git checkouts, and what is left out of them."""

from __future__ import annotations

import subprocess

import pytest

from moe_prism.data import read_documents, split_documents
from moe_prism.errors import CorruptError, UsageError

from .texts import HI, YO, lines, read


def test_a_missing_library_is_one_line_with_the_command(tmp_path, monkeypatch):
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_text("{}")
    for path in (tmp_path / "a.parquet", tmp_path / "a.jsonl.zst", saved, tmp_path):
        with pytest.raises(UsageError, match=r"(pyarrow|library) is missing") as raised:
            read(path)
        assert "pip install 'moe-prism[text]'" in raised.value.next_step


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": [HI, None, YO]})
    one.save_to_disk(str(tmp_path / "one"))
    found, tally = read(tmp_path / "one")
    assert found == [HI, YO] and tally.left_out == {"null rows": 1}
    test = datasets.Dataset.from_dict({"text": ["the benchmark"]})
    datasets.DatasetDict({"train": one, "test": test}).save_to_disk(str(tmp_path / "both"))
    found, tally = read(tmp_path / "both")
    assert found == [HI, YO] and tally.left_out["rows of other splits than train"] == 1
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(CorruptError, match="cannot be read"):
        read(tmp_path / "one")


def test_a_dataset_folder_of_the_hub_is_its_tables(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A card, and no text of the data set\n")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": [HI]}), tmp_path / "data" / "train-00000-of-00001.parquet")
    pq.write_table(pa.table({"text": ["the benchmark"]}), tmp_path / "data" / "test-00000-of-00001.parquet")
    found, tally = read(tmp_path)
    assert found == [HI]
    assert tally.left_out == {"files beside the data set's tables": 1, "files of other splits than train": 1, "hidden files": 1}


def test_a_folder_takes_every_file_of_text_and_counts_the_others(tmp_path):
    for name in ("a.js", "b.rs", "c.TXT", "LICENSE", "d.html", "e.ts"):
        (tmp_path / name).write_text(f"text of {name}")
    lines(tmp_path / "f.ndjson", [{"text": "a row"}])
    (tmp_path / "g.csv").write_text("text\na cell\n")
    (tmp_path / "package.json").write_text('{"name": "x", "version": "1"}')
    (tmp_path / "h.ipynb").write_text('{"cells": [], "nbformat": 4}')
    (tmp_path / "blank.md").write_text("\n\n")
    (tmp_path / "program").write_bytes(b"\x7fELF\0\0\1")
    (tmp_path / "random.txt").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + bytes(range(100)))
    (tmp_path / ".env").write_text("SECRET=1")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    pytest.importorskip("pyarrow")
    found, tally = read(tmp_path)
    assert sorted(found) == sorted(
        [*(f"text of {n}" for n in ("a.js", "b.rs", "c.TXT", "LICENSE", "d.html", "e.ts")), "a row", "a cell"]
    )
    assert tally.left_out == {
        "files of rows without a field of text": 2,
        "empty files": 1,
        "binary files": 2,
        "damaged files": 1,
        "hidden files": 1,
        "links and special files": 1,
        "Git LFS pointers (the file itself was not fetched)": 1,
    }


def test_a_folder_of_one_damaged_file_is_that_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ')
    with pytest.raises(CorruptError, match=r"rows\.jsonl:1"):
        read(tmp_path)


def test_a_git_checkout_is_what_git_tracks(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except OSError:
        pytest.skip("no git")
    (tmp_path / "main.py").write_text("tracked = 1")
    (tmp_path / "out.log").write_text("not tracked")
    hostile = tmp_path / "ran"
    subprocess.run([*git, "add", "main.py"], check=True)
    subprocess.run([*git, "config", "core.fsmonitor", f"touch {hostile}; false"], check=True)
    found, _ = read(tmp_path)
    assert found == ["tracked = 1"]
    assert not hostile.exists()  # what a checkout's configuration names is not run


def test_a_file_and_its_copy_by_another_name_are_on_one_side(tmp_path):
    for i in range(40):
        (tmp_path / f"file{i}.txt").write_text("the same text" if i % 2 else f"text {i}")
    documents = read_documents(tmp_path)
    sides = [{d.sha256 for d in split_documents(documents, side, source="folder")} for side in ("calibration", "evaluation")]
    assert all(sides) and not sides[0] & sides[1]
