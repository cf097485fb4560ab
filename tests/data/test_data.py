"""Reading text, splitting it, cutting windows."""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.data import Document, bucket_of, read_documents, split_documents, token_windows
from moe_prism.data.bundled import BUNDLED, DOMAINS, SHIPPED, is_program
from moe_prism.data.near_copies import shingles, without_near_copies
from moe_prism.errors import CorruptError, UsageError

NAME = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda n: n not in (".", "..")
)
NAMES = st.lists(NAME, min_size=1, max_size=12)


class Characters:
    """A tokenizer of one id per character, with a document mark."""

    bos_token_id, eos_token_id = 1, None

    def __call__(self, text, **_):
        return {"input_ids": [2 + ord(c) % 90 for c in text]}


def both(documents, source="folder"):
    return split_documents(documents, "calibration", source=source), split_documents(documents, "evaluation", source=source)


@settings(max_examples=40, deadline=None)
@given(NAMES)
def test_the_two_sides_share_nothing(names):
    documents = [Document(f"{i}/{name}", f"text {i} {name} " * 9) for i, name in enumerate(names)]
    calibration, evaluation = both(documents)
    assert calibration and evaluation
    assert not {d.name for d in calibration} & {d.name for d in evaluation}
    whole = sum(len(d.text) for d in documents)
    assert sum(len(d.text) for d in [*calibration, *evaluation]) == whole
    # what one side holds cannot depend on the order of reading or on who asks
    assert {d.name for d in both(documents[::-1])[0]} == {d.name for d in calibration}


@settings(max_examples=40, deadline=None)
@given(NAMES, st.sampled_from(["stdlib", "domains/prose", "folder"]))
def test_copies_of_a_file_land_together(names, source):
    documents = [Document(f"{folder}/{name}", "x = 1\n") for name in names for folder in ("a", "b/c")]
    calibration, evaluation = both(documents, source)
    if any("[" not in d.name for d in calibration):
        sides = [{d.name.rpartition("/")[2] for d in side if "[" not in d.name} for side in (calibration, evaluation)]
        assert not sides[0] & sides[1]
    assert all(bucket_of(f"a/{name}") == bucket_of(f"b/c/{name}") for name in names)


def test_one_file_is_cut_in_two(tmp_path):
    (tmp_path / "one.txt").write_text("abcdefghij" * 10)
    documents = read_documents(tmp_path / "one.txt")
    calibration, evaluation = both(documents, str(tmp_path / "one.txt"))
    assert calibration[0].text + evaluation[0].text == documents[0].text
    assert len(evaluation[0].text) == 20


def test_a_folder_is_read_in_a_stable_order_with_its_json_lines(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "sub" / "a.md").write_text("ay")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    found = {d.name: d.text for d in read_documents(tmp_path)}
    assert found == {"b.txt": "bee", "sub/a.md": "ay", "c.jsonl:1": "one", "c.jsonl:3": "two"}
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("missing.txt", None, UsageError, "does not exist"),
        ("binary.txt", bytes(range(256)), UsageError, "no text in UTF-8, UTF-16 or Latin-1"),
        ("cyrillic.txt", ("Кодировка, которой никто не назвал. " * 9).encode("cp1251"), UsageError, "no text in UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', CorruptError, r"broken\.jsonl:2 is not JSON"),
        ("field.jsonl", b'{"content": "a"}', UsageError, "has the fields 'content', none that is known as text"),
        ("list.jsonl", b"[1]", UsageError, "rows that are no objects"),
    ],
)
def test_bad_sources_are_named(tmp_path, name, content, error, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=says) as raised:
        read_documents(tmp_path / name)
    assert raised.value.next_step


def test_json_lines_may_hold_any_character(tmp_path):
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    assert [d.text for d in read_documents(tmp_path / "rows.jsonl")] == ["a\u2028b\x85c", "d"]
    (tmp_path / "half.jsonl").write_text('{"text": "x\\ud800y"}')
    assert read_documents(tmp_path / "half.jsonl")[0].sha256  # half a surrogate pair is no text


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_f09_empty_text_is_refused(tmp_path, content):
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(UsageError, match="is empty"):
        token_windows(Characters(), str(tmp_path / "empty.txt"), "calibration", length=8, tokens=8)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="no text found"):
        read_documents(tmp_path / "folder")


def test_f09_too_little_text_for_a_window_says_how_much_there_is(tmp_path):
    (tmp_path / "short.txt").write_text("0123456789")
    with pytest.raises(UsageError, match="has 9 tokens for calibration, less than one window of 16"):
        token_windows(Characters(), str(tmp_path / "short.txt"), "calibration", length=16, tokens=64)


def test_windows_are_deterministic_and_spread_over_the_source(tmp_path):
    (tmp_path / "long.txt").write_text("".join(chr(33 + i // 100) for i in range(5000)))
    source = str(tmp_path / "long.txt")
    first, second = (token_windows(Characters(), source, "calibration", length=50, tokens=400) for _ in range(2))
    assert torch.equal(first.ids, second.ids) and first.ids.shape == (8, 50) and first.tokens == 400
    everything = token_windows(Characters(), source, "calibration", length=50, tokens=10**9)
    assert everything.ids.shape == (80, 50) and everything.characters == 4000
    rows = [everything.ids.tolist().index(row) for row in first.ids.tolist()]
    assert rows == [i * 10 for i in range(8)]  # every tenth window: a sample of the whole text


def test_excluded_documents_are_never_used(tmp_path):
    for i in range(12):
        (tmp_path / f"file{i}.txt").write_text(f"{i:02d} " * 40)
    shared = (tmp_path / "file3.txt").read_text()
    (tmp_path / "copy-under-another-name.txt").write_text(shared)
    calibration = token_windows(Characters(), str(tmp_path), "calibration", length=8, tokens=10**6)
    evaluation = token_windows(Characters(), str(tmp_path), "evaluation", length=8, tokens=10**6, exclude=calibration.documents)
    assert calibration.documents and evaluation.documents
    assert not set(calibration.documents) & set(evaluation.documents)


def test_the_bundled_text_has_two_sides():
    calibration, evaluation = both(read_documents("stdlib"), "stdlib")
    assert {bucket_of(d.name) for d in calibration} == {1} and {bucket_of(d.name) for d in evaluation} == {0}
    assert sum(len(d.text) for d in calibration) > 100_000
    assert not {d.sha256 for d in calibration} & {d.sha256 for d in evaluation}


def test_the_help_topics_are_prose_with_two_sides():
    documents = read_documents("topics")
    assert documents == sorted(documents, key=lambda d: d.name)
    calibration, evaluation = both(documents, "topics")
    assert {bucket_of(d.name) for d in evaluation} <= set(range(8)) and min(bucket_of(d.name) for d in calibration) >= 8
    assert not {d.sha256 for d in calibration} & {d.sha256 for d in evaluation}  # Python has one topic by two names
    assert {d.sha256 for d in [*calibration, *evaluation]} == {d.sha256 for d in documents}
    assert sum(len(d.text) for d in evaluation) > 50_000
    words = " ".join(d.text for d in documents).split()
    assert words.count("the") > 0.03 * len(words)  # English, not code


def test_an_interpreter_without_help_topics_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match="without its help topics"):
        read_documents("topics")


def test_tables_are_left_out_of_the_bundled_text_and_programs_are_not():
    root = Path(sysconfig.get_path("stdlib"))
    assert not any(
        is_program((root / name).read_text("utf-8")) for name in ("encodings/cp1252.py", "encodings/cp437.py", "html/entities.py")
    )
    assert all(is_program((root / name).read_text("utf-8")) for name in ("argparse.py", "this.py", "enum.py", "http/__init__.py"))
    assert not any("encodings/" in d.name and "charmap" in d.text for d in read_documents("stdlib"))


@pytest.mark.parametrize("name", [n for n in BUNDLED if n != "topics"])
def test_no_near_copy_of_an_evaluation_text_calibrates(name):
    """Brute force: the share of a document's runs of ten words that stand in the other side."""
    runs = {d.name: _runs(d.text) for d in read_documents(name)}
    calibration, evaluation = both(read_documents(name), name)
    assert len(calibration) + len(evaluation) == len(runs) and sum(len(d.text) for d in evaluation) > 100_000
    held = set().union(*(runs[d.name] for d in evaluation))
    for document in calibration:
        assert len(runs[document.name] & held) <= 0.35 * len(runs[document.name]), document.name


def _runs(text):
    words = re.findall(r"\w+", text)
    return {tuple(words[i : i + 10]) for i in range(len(words) - 9)}


def test_the_shipped_domains_are_named_with_their_licences():
    notice = (SHIPPED.parent / "NOTICE").read_text()
    for name in DOMAINS:
        for document in read_documents(f"domains/{name}"):
            assert document.name.partition("/")[2].rpartition("/")[2] in notice
    assert [d.name for d in read_documents("domains")] == [d.name for n in DOMAINS for d in read_documents(f"domains/{n}")]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a", "b"]), max_size=60))
def test_shingles_are_the_distinct_runs_of_ten_words(words):
    assert len(shingles(" ".join(words))) == len({tuple(words[i : i + 10]) for i in range(len(words) - 9)})


def test_near_copies_go_and_what_contains_a_protected_text_goes_too():
    text = {n: " ".join(f"{n}{i * i % 997}" for i in range(400)) for n in ("a", "b", "c")}
    a, b = Document("a", text["a"]), Document("b", text["b"])
    changed = Document("changed", "another header " + text["a"][:-200])
    container = Document("container", text["a"] + " " + " ".join([text["c"]] * 1 + [f"z{i}" for i in range(5000)]))
    assert without_near_copies([a, changed, b, container]) == [a, b, container]
    assert without_near_copies([changed, b, container], protected=[a]) == [b]
    header = " ".join(f"licence{i}" for i in range(40))
    files = [Document(str(i), header + " " + " ".join(f"w{i}x{j}" for j in range(40))) for i in range(30)]
    assert without_near_copies(files) == files  # what all share is boilerplate, not a copy
    assert without_near_copies([*files, Document("only the header", header)]) == files


def test_options_name_the_shipped_texts_without_reading_any():
    from moe_prism.data.bundled import BUNDLED
    from moe_prism.options.text import SHIPPED_TEXTS

    assert tuple(BUNDLED) == SHIPPED_TEXTS
