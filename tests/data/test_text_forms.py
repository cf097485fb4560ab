"""Text of any bytes: encodings, damage, limits, and how documents are dealt to sides."""

from __future__ import annotations

import gzip
import json
import shutil
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
from moe_prism.errors import PrismError
from moe_prism.tally import TextTally

from .texts import HI, YO, lines, read


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
