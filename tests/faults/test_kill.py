"""Kills, interruptions and rivals of `refactor` (F01, F02, F03, F05, F10 of the fault list)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_sources import save_tiny

TRIALS = (12, pytest.param(48, marks=pytest.mark.slow))  # a multiple of 6: the five phases, and a random time
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", params=TRIALS)
def outcome(request, shared, text_file) -> dict:
    """All trials, run once: see trials.py."""
    trials = request.param

    def build(folder: Path) -> None:
        save_tiny("olmoe", folder / "source", num_hidden_layers=2)
        arguments = [sys.executable, "-m", "tests.faults.trials", *map(str, (folder / "source", text_file, folder, trials))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "outcome.json").write_text(done.stdout)

    return json.loads((shared(f"kill-trials-{trials}", build) / "outcome.json").read_text())


def test_f01_every_killed_run_continues_to_the_same_bytes(outcome):
    bad = [row for row in outcome["trials"] if not row["equal"]]
    assert not bad, bad  # each row holds its seed


def test_f01_the_kills_hit_every_phase(outcome):
    killed = [row for row in outcome["trials"] if row["code"] == -9]
    assert len(killed) >= len(outcome["trials"]) * 3 // 4  # a kill at a random time may come too late
    assert set(outcome["counts"]) >= {"calibrate", "partition", "write", "finish"}
    assert {row["phase"] for row in killed} >= set(outcome["counts"])


def test_f02_what_is_visible_after_a_kill_is_complete(outcome):
    assert all(row["complete"] is not False for row in outcome["trials"])
    # both sides of the rename were seen
    assert {row["complete"] for row in outcome["trials"]} == {None, True}
    assert all(row["partial"] != bool(row["complete"]) for row in outcome["trials"] if row["code"] == -9 and row["phase"])


def test_f05_temporaries_of_a_kill_are_swept(outcome):
    assert any(row["temporaries"] for row in outcome["trials"])
    # `equal` above compares every file of OUT; nothing may stay beside it
    assert all(row["beside"] in ([], ["out.lock"]) for row in outcome["trials"])
    assert all(row["beside"] == [] for row in outcome["trials"] if not row["complete"])


def test_f03_one_interrupt_ends_with_130_and_can_be_continued(outcome):
    result = outcome["interrupt"]
    assert result["code"] == 130 and not result["visible"]
    assert len(result["lines"]) == 1 and "--resume" in result["lines"][0]
    assert result["resumed"] == 0 and result["equal"]


def test_f10_a_second_run_names_the_first_and_leaves_it_alone(outcome):
    result = outcome["twice"]
    assert result["code"] == 2
    assert f"pid {result['pid']}" in result["line"] and result["line"].count("\n") == 1
    assert result["first"] == 0 and result["equal"]
