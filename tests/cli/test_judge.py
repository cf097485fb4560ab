"""`frontier --judge` from the command line."""

from __future__ import annotations

import json

import pytest

from moe_prism.cli import main

SMALL = ["--tokens", "512", "--length", "128", "--methods", "uniform"]


@pytest.mark.parametrize(("model", "other"), [("tiny", "routing"), pytest.param("nano", "copy", marks=pytest.mark.slow)])
def test_slices_stand_in_the_file_and_in_the_table(model, other, tiny_source, tmp_path, capsys):
    """routing: a random model copies nothing."""
    folder = str(tiny_source) if model == "tiny" else model
    assert main(["frontier", folder, "-o", str(tmp_path), *SMALL, "--judge", f"{other},continuation"]) == 0
    found = json.loads((tmp_path / "frontier.json").read_text())
    full = next(p for p in found["points"] if p["name"] == "full" or p["budget"] == 1)
    assert {name: s["kept"] for name, s in full["slices"].items()} == {other: 1.0, "continuation": 1.0}
    every = [*found["points"], *found["baseline_topk"], *found["baseline_bits"]]
    assert all(set(p["slices"]) == {other, "continuation"} for p in every)
    assert not full["slices"]["continuation"]["is_ability"] and found["provenance"]["judge"] == {"left_out": {}}
    assert "worst slice" in capsys.readouterr().out
    assert "By slice" in (tmp_path / "report.html").read_text()


def test_what_cannot_be_judged_is_refused(tmp_path, capfd):
    assert main(["frontier", "nano", "-o", str(tmp_path), *SMALL, "--judge", "clooze"]) == 2
    assert "unknown slice 'clooze'" in capfd.readouterr().err
    assert main(["frontier", "nano", "-o", str(tmp_path), *SMALL, "--judge", "all", "--low-memory"]) == 2
    assert "--judge generates text" in capfd.readouterr().err
    assert main(["frontier", "nano", "-o", str(tmp_path), *SMALL, "--judge", "syntax", "--text", "domains/web"]) == 2
    assert "slice 'syntax' cannot be judged" in capfd.readouterr().err
