"""Text in the forms people have it: every kind of file, row, folder and damage, with what comes of it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import subprocess
import tracemalloc
from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_prism.data import read_documents, split_documents, token_windows
from moe_prism.data import text as text_module
from moe_prism.data.json_rows import json_values
from moe_prism.data.sample import bounded
from moe_prism.data.stream import Allowance, Characters
from moe_prism.data.text import Reading
from moe_prism.errors import CorruptError, PrismError, UsageError
from moe_prism.tally import TextTally

HI, YO = "How do I sort a list?", "Call sorted(list)."


def read(path, *names):
    """(texts, tally) of a path."""
    tally = TextTally(str(path))
    return [d.text for d in read_documents(path, Reading(tally, names))], tally


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


SHAPES = {
    "text": ({"text": HI}, HI),
    "messages": ({"messages": [{"role": "user", "content": HI}, {"role": "assistant", "content": YO}]}, f"{HI}\n\n{YO}"),
    "sharegpt": ({"conversations": [{"from": "human", "value": HI}, {"from": "gpt", "value": YO}]}, f"{HI}\n\n{YO}"),
    "prompt": ({"prompt": "1 + 1 =", "completion": " 2"}, "1 + 1 = 2"),
    "prompt of turns": (
        {"prompt": [{"role": "user", "content": HI}], "completion": [{"role": "assistant", "content": YO}]},
        f"{HI}{YO}",
    ),
    "instruction": ({"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3"}, "Sort.\n\n3 1 2\n\n1 2 3"),
    "instruction alone": ({"instruction": "Sort.", "input": "", "output": "1 2 3"}, "Sort.\n\n1 2 3"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": HI}]}]}, HI),
    "text first": ({"id": 7, "messages": None, "text": HI, "prompt": "x"}, HI),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["lines", "array", "indented", "single"])
def test_rows_of_json(tmp_path, shape, form):
    row, said = SHAPES[shape]
    rows = [row, row]
    if form == "lines":
        path = lines(tmp_path / "rows.jsonl", rows)
    else:
        path = tmp_path / "rows.json"
        path.write_text("\n".join(json.dumps(r, indent=2) for r in rows) if form == "single" else json.dumps(rows, indent=2))
    found, tally = read(path)
    assert found == [said, said] and not tally.line()


def test_an_array_in_a_file_of_lines_and_lines_in_a_json_file(tmp_path):
    rows = [{"text": HI}, {"text": YO}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows))
    lines(tmp_path / "b.json", rows)
    lines(tmp_path / "c", rows)  # no suffix says what it is, its first line does
    assert [read(tmp_path / name)[0] for name in ("a.jsonl", "b.json", "c")] == [[HI, YO]] * 3


def test_named_fields(tmp_path):
    path = lines(tmp_path / "qa.jsonl", [{"question": HI, "answer": YO, "id": 3}])
    assert read(path, "answer")[0] == [YO]
    assert read(path, "question", "answer")[0] == [f"{HI}\n\n{YO}"]
    with pytest.raises(UsageError, match="has the fields 'question', 'answer', 'id', none that is known") as raised:
        read(path)
    assert "--text-field" in raised.value.next_step
    with pytest.raises(UsageError, match="not 'content'"):
        read(path, "content")


def test_null_empty_and_strange_rows_are_counted(tmp_path):
    rows = [{"text": HI}, {"text": None}, {"text": " \n"}, {"other": 1}, {"messages": []}, {"text": 7}, {"text": YO}]
    rows += [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]
    found, tally = read(lines(tmp_path / "rows.jsonl", rows))
    assert found == [HI, YO]
    assert tally.left_out == {
        "null rows": 1,
        "empty rows": 2,
        "rows without a field of text": 1,
        "rows whose field is no text": 1,
        "rows with pictures or other parts that are no text": 1,
    }
    assert tally.line().count("\n") == 0 and "null rows 1 (first: rows.jsonl:2)" in tally.line()
    assert tally.to_json()["left_out"]["empty rows"] == 2


def test_rows_of_nothing_are_an_error_with_the_counts(tmp_path):
    with pytest.raises(UsageError, match=r"no text found.*null rows 2"):
        read(lines(tmp_path / "rows.jsonl", [{"text": None}] * 2))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"text": "a"}, {"text": "b', "element 2 is not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "a comma is missing"),
        ('{"text": "a"}\n{"text": }', "element 2 is not JSON"),
        ('{"text": ' + "[" * 100_000, "is not JSON"),
    ],
)
def test_broken_json_names_its_place(tmp_path, content, says):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(CorruptError, match=says):
        read(tmp_path / "rows.json")


def test_csv_by_column(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"one, with ""quotes""\nand lines"\n2,\n3,three\n')
    found, tally = read(tmp_path / "a.csv")
    assert found == ['one, with "quotes"\nand lines', "three"] and tally.left_out == {"empty rows": 1}
    (tmp_path / "b.csv").write_text("prompt;completion\n1+1=;2\n")
    assert read(tmp_path / "b.csv")[0] == ["1+1=2"]
    (tmp_path / "c.tsv").write_text("id\tbody\n1\tone\n")
    assert read(tmp_path / "c.tsv", "body")[0] == ["one"]
    with pytest.raises(UsageError, match="has the fields 'id', 'body'"):
        read(tmp_path / "c.tsv")
    (tmp_path / "d.csv").write_text('text\n"never closed')
    assert read(tmp_path / "d.csv")[0] == ["never closed\n"]


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", None)])
def test_compressed_files(tmp_path, suffix, pack):
    if pack is None:
        pack = pytest.importorskip("pyarrow").Codec("zstd").compress
    rows = "\n".join(json.dumps({"text": t}) for t in (HI, YO)).encode()
    for name, content in (("rows.jsonl", rows), ("a.txt", HI.encode()), ("c.csv", b"text\nx\n")):
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(bytes(pack(content)))
        assert read(path)[0] == {"rows.jsonl": [HI, YO], "a.txt": [HI], "c.csv": ["x"]}[name]
    damaged = tmp_path / f"damaged.txt.{suffix}"
    damaged.write_bytes(bytes(pack(rows * 50))[:-9])
    with pytest.raises(CorruptError, match="cannot be decompressed"):
        read(damaged)


def test_parquet_and_arrow(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    chats = [[{"role": "user", "content": HI}, {"role": "assistant", "content": YO}], None]
    pq.write_table(pa.table({"messages": chats, "image": [b"\0", b"\1"]}), tmp_path / "a.parquet")
    found, tally = read(tmp_path / "a.parquet")
    assert found == [f"{HI}\n\n{YO}"] and tally.left_out == {"null rows": 1}
    table = pa.table({"text": [HI, YO]})
    for writer, name in ((pa.ipc.new_file, "file.arrow"), (pa.ipc.new_stream, "stream.arrow")):
        with writer(str(tmp_path / name), table.schema) as sink:
            sink.write_table(table)
        assert read(tmp_path / name)[0] == [HI, YO]
    pq.write_table(pa.table({"content": [HI]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="has the fields 'content'"):
        read(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", "content")[0] == [HI]
    (tmp_path / "c.parquet").write_bytes(b"PAR1" + bytes(90))
    with pytest.raises(CorruptError, match="cannot be read"):
        read(tmp_path / "c.parquet")


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


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("a.txt", "utf-16"), ("b.txt", "utf-8-sig"), ("c.txt", "utf-16-le"), ("d.txt", "utf-16-be"), ("e.txt", "utf-32")],
)
def test_wide_text_and_byte_order_marks(tmp_path, name, encoding):
    said = "Grüße, and a line of plain text.\n" * 9
    (tmp_path / name).write_bytes(said.encode(encoding))
    assert read(tmp_path / name)[0] == [said]
    rows = "".join(json.dumps({"text": t}) + "\r\n" for t in (HI, YO))
    (tmp_path / "rows.jsonl").write_bytes(rows.encode(encoding))
    assert read(tmp_path / "rows.jsonl")[0] == [HI, YO]


def test_latin_1_is_read_with_a_remark(tmp_path):
    for encoding in ("latin-1", "cp1252"):
        said = "Un café, s'il vous plaît. "
        (tmp_path / "a.txt").write_bytes(said.encode(encoding))
        found, tally = read(tmp_path / "a.txt")
        assert found == [said] and "read as Latin-1, not UTF-8 2" in tally.line()
    (tmp_path / "rows.jsonl").write_bytes('{"text": "naïve"}'.encode("latin-1"))
    assert read(tmp_path / "rows.jsonl")[0] == ["naïve"]


SUFFIXES = (
    ".txt",
    ".md",
    "",
    ".jsonl",
    ".json",
    ".csv",
    ".parquet",
    ".arrow",
    ".gz",
    ".jsonl.gz",
    ".csv.xz",
    ".jsonl.zst",
    ".bz2",
)
FRAGMENTS = st.sampled_from(
    [
        b'{"text": "a"}',
        b"[",
        b"]",
        b",",
        b"\n",
        b'"',
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"PAR1",
        b"\x1f\x8b\x08",
        b"text\n",
        b"\xe9",
        b"1e999",
        b"null",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SUFFIXES), st.lists(FRAGMENTS | st.binary(max_size=12), max_size=12).map(b"".join), st.booleans())
def test_whatever_a_file_holds_is_text_or_one_explained_error(tmp_path, suffix, content, in_folder):
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / f"file{suffix}").write_bytes(content)
    try:
        documents = read_documents(folder if in_folder else folder / f"file{suffix}")
    except PrismError as error:
        assert error.next_step and "\n" not in str(error)[:20]
    else:
        assert all(d.text.encode("utf-8") is not None for d in documents)


def test_zeros_line_ends_and_long_lines_are_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(5000) + b"text")
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "c.txt").write_text("a b c " * 200_000)
    assert [len(read(tmp_path / name)[0][0]) for name in ("a.txt", "b.txt", "c.txt")] == [5004, 10, 1_200_000]


def test_a_row_that_is_too_long_is_counted_and_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_prism.data.stream.ROW_CHARACTERS", 1 << 16)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(b'{"text": "short"}\n{"text": "')
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "last"}\n')
    tracemalloc.start()
    found, tally = read(tmp_path / "rows.jsonl.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["short", "last"] and sum(tally.left_out.values()) == 1
    assert peak < 8 << 20  # of a row of 64 MiB


def test_what_unpacks_to_more_than_is_allowed_is_cut_and_counted(tmp_path):
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"{i} " * 50}).encode() + b"\n")
    tally = TextTally("bomb")
    found = read_documents(tmp_path / "bomb.jsonl.gz", Reading(tally, allowance=Allowance(1 << 18)))
    assert 100 < len(found) < 20_000 and any("GiB" in reason for reason in tally.left_out)


def test_elements_of_an_array_are_read_one_by_one(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("[" + ",".join(json.dumps({"text": "x" * 1000}) for _ in range(20_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in json_values(Characters(path, path.name, TextTally("x"), Allowance())))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 8 << 20  # of 20 MB


def test_a_long_text_is_cut_into_pieces_that_make_it_up(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONG_TEXT", 4000)
    monkeypatch.setattr(text_module, "PIECE", 1000)
    said = "".join(f"line {i}\n" for i in range(5000))
    (tmp_path / "long.txt").write_text(said)
    documents = read_documents(tmp_path / "long.txt")
    assert "".join(d.text for d in documents) == said and len(documents) > 40
    assert all(d.text.endswith("\n") and d.is_part for d in documents)


def test_rows_are_split_by_what_they_say(tmp_path):
    rows = [{"text": f"{i % 150} is said by this row"} for i in range(300)]  # every text twice
    documents = read_documents(lines(tmp_path / "rows.jsonl", rows))
    sides = [split_documents(documents, side, source="rows") for side in ("calibration", "evaluation")]
    calibration, evaluation = ({d.sha256 for d in side} for side in sides)
    assert not calibration & evaluation and len(calibration) > len(evaluation) > 5
    assert len(sides[0]) + len(sides[1]) == 300
    other = read_documents(lines(tmp_path / "other.jsonl", rows[::-1]))  # neither order nor file decides
    assert {d.sha256 for d in split_documents(other, "evaluation", source="other")} == evaluation


def test_documents_of_no_window_are_not_called_used(tmp_path):
    lines(tmp_path / "rows.jsonl", [{"text": f"row {i:04d} of many"} for i in range(400)])

    class Characters:
        bos_token_id, eos_token_id = None, None

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text]}

    windows = token_windows(Characters(), str(tmp_path / "rows.jsonl"), "calibration", length=32, tokens=96)
    said = "".join(map(chr, windows.ids.flatten().tolist()))
    documents = {d.sha256: d.text for d in read_documents(tmp_path / "rows.jsonl")}
    used = [documents[hashed] for hashed in windows.documents]
    assert 6 <= len(used) <= 12 and all(any(text[at : at + 4] in said for at in (0, 4, 8, 12)) for text in used)
    assert windows.characters == sum(map(len, used))


def test_a_file_and_its_copy_by_another_name_are_on_one_side(tmp_path):
    for i in range(40):
        (tmp_path / f"file{i}.txt").write_text("the same text" if i % 2 else f"text {i}")
    documents = read_documents(tmp_path)
    sides = [{d.sha256 for d in split_documents(documents, side, source="folder")} for side in ("calibration", "evaluation")]
    assert all(sides) and not sides[0] & sides[1]


def test_a_sample_of_documents_depends_on_nothing_but_them(tmp_path):
    documents = read_documents(lines(tmp_path / "rows.jsonl", [{"text": f"{i} " * 50} for i in range(400)]))
    tally = TextTally("rows")
    kept = bounded(documents, 5000, tally)
    assert 4500 < sum(len(d.text) for d in kept) <= 5000 and sum(tally.remarks.values()) == 400 - len(kept)
    assert {d.sha256 for d in bounded(documents[::-1], 5000, TextTally(""))} == {d.sha256 for d in kept}
    assert bounded(documents, 10**9, tally) == documents
    # which part of a larger source is held does not say on which side it falls
    sides = [len(split_documents(kept, side, source="rows")) for side in ("calibration", "evaluation")]
    assert all(sides) and sum(sides) == len(kept)
    assert list(chain(kept)) == sorted(kept, key=documents.index)
