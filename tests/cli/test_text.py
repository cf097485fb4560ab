"""Text at the command line: one reader for all commands, and what it left out in every result."""

from __future__ import annotations

import inspect
import json

import pytest

from moe_prism.cli import build, main
from moe_prism.data import token_windows
from moe_prism.options.text import TextSource

SMALL = ("--tokens", "512", "--length", "64")
READERS = ("calibrate", "refactor", "adopt", "prune", "recover", "skip", "frontier", "forecast", "trace")


@pytest.fixture(scope="module")
def rows(tmp_path_factory, text_file):
    text = text_file.read_text("utf-8")
    parts = [text[i : i + 1500] for i in range(0, 30_000, 1500)]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": part if i % 5 else None}) for i, part in enumerate(parts)))
    return path


@pytest.mark.parametrize("name", READERS)
def test_every_command_that_reads_text_takes_its_fields(name):
    command = build()[name].default_command
    assert {"text", "text_field"} <= set(inspect.signature(command).parameters)


def test_counts_are_a_line_and_in_json(tiny_source, rows, tmp_path, capfd):
    given = ["calibrate", str(tiny_source), "--text", str(rows), *SMALL, "--collectors", "counts"]
    assert main([*given, "-o", str(tmp_path / "a"), "--json"]) == 2
    out, err = capfd.readouterr()
    assert "has the fields 'body'" in err and "--text-field" in json.loads(out)["next_step"]
    assert main([*given, "--text-field", "body", "-o", str(tmp_path / "a"), "--json"]) == 0
    out, err = capfd.readouterr()
    line = f"text {rows}: 16 documents; left out null rows 4 (first: rows.jsonl:1)"
    assert err.count(line) == 1
    read = [{"source": str(rows), "documents": 16, "left_out": {"null rows": 4}}]
    assert json.loads(out)["read"] == read
    facts = json.loads((tmp_path / "a" / "prism.json").read_text())["facts"]
    assert facts["read"] == read and facts["text_source"]["fields"] == ["body"]


def test_fields_and_domains_that_are_not_there_are_refused_before_any_work(tiny_source, tmp_path, capfd):
    out = ["-o", str(tmp_path / "out"), *SMALL]
    assert main(["calibrate", str(tiny_source), "--text-field", "body", *out]) == 2
    assert "'domains' has no fields" in capfd.readouterr().err
    assert main(["prune", str(tiny_source), "--for-domain", "code", *out]) == 2
    assert "--domain code=PATH" in capfd.readouterr().err


def test_domains_are_balanced_and_quality_is_said_of_each(tiny_source, rows, text_file, tmp_path, capfd):
    domains = ["--domain", f"rows={rows}", "--domain", f"file={text_file}", "--text-field", "body"]
    assert main(["frontier", str(tiny_source), "-o", str(tmp_path), "--methods", "uniform", *domains, *SMALL]) == 0
    out, _ = capfd.readouterr()
    assert "worst domain" in out
    found = json.loads((tmp_path / "frontier.json").read_text())
    point = next(p for p in found["points"] if p["budget"] < 1)
    kl = [point["domains"][name]["kl"] for name in ("rows", "file")]
    assert point["kl"] == pytest.approx(sum(kl) / 2)  # as many tokens of each
    assert found["provenance"]["evaluation"]["domains"] == {"rows": 256, "file": 256}


def test_text_of_one_domain_does_not_evaluate_another(tiny_source, tmp_path):
    from moe_prism.model import load_tokenizer

    rows = [json.dumps({"text": f"row {i} says this and no more than this, and that is all"}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b").mkdir()
    for i, row in enumerate(rows):  # the same texts as files, which other sides are chosen for
        (tmp_path / "b" / f"{i}.txt").write_text(json.loads(row)["text"])
    source = TextSource((("a", str(tmp_path / "a.jsonl")), ("b", str(tmp_path / "b"))))
    sides = [
        set(token_windows(load_tokenizer(tiny_source), source, side, length=16, tokens=10**5).documents)
        for side in ("calibration", "evaluation")
    ]
    assert all(sides) and not sides[0] & sides[1]
