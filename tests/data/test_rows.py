"""Rows of text in the files people have: JSON, tables, compressed, and what is said of damaged ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pytest

from moe_prism.errors import CorruptError, UsageError

from .texts import HI, YO, lines, read

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
