"""Every command that writes, killed at random moments: what is left is whole, or the command ends in the same bytes (F01, F02, F05).

`python -m tests.faults.kills 50` prints the figures: 50 kills of each of 8 commands.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSIDE = ("frontier", "skip", "serve", "serve with a store")
"""They change a finished folder."""
COMMANDS = ("refactor", "calibrate", "prune", "recover", *INSIDE)
KILLS = 50
"""By night; test_kill.py kills `refactor` twelve times with every commit."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="session")
def outcomes(shared) -> list[dict]:
    def build(folder: Path) -> None:
        folder.mkdir()
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
        arguments = [sys.executable, "-m", "tests.faults.kills", str(KILLS), *COMMANDS]
        done = subprocess.run(arguments, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "outcomes.jsonl").write_text(done.stdout)

    return [json.loads(line) for line in (shared("killed", build) / "outcomes.jsonl").read_text().splitlines()]


def test_f01_what_a_kill_leaves_is_whole_or_is_continued_to_the_same_bytes(outcomes):
    assert {row["command"] for row in outcomes} == {*COMMANDS}
    for row in outcomes:
        assert not row["bad"], row  # each row holds its seed
        assert row["killed"] >= 2, row


def test_f02_a_finished_folder_is_as_it_was_or_as_it_was_to_become(outcomes):
    inside = [row for row in outcomes if row["command"] in INSIDE]
    assert all(not row["nothing"] and row["old"] and row["new"] for row in inside), inside
