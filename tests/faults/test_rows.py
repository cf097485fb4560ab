"""The reliability page says what is run, and nothing else."""

from __future__ import annotations

import re
from collections import Counter

from tests.faults import rows
from tests.faults.rows import PAGE, ROOT, ROWS, found, page


def test_every_row_has_a_test_of_its_name():
    named = {test.row for test in found()}
    assert not [row.id for row in ROWS if row.id not in named], "the page would claim rows that nothing shows"
    assert not named - {row.id for row in ROWS}, "a test names a row that the page does not have"


def test_the_rows_are_the_forty_five():
    assert Counter(row.id[0] for row in ROWS) == {"F": 14, "S": 22, "X": 6, "D": 3} and len({row.id for row in ROWS}) == 45
    for row in ROWS:
        assert row.fault and row.asked and row.reached and "|" not in row.fault + row.asked + row.reached + row.short


def test_a_row_without_a_test_is_seen(monkeypatch):
    real = tuple(test for test in found() if test.row != "F05")
    monkeypatch.setattr(rows, "found", lambda: real)
    line = next(line for line in page().splitlines() if line.startswith("| F05 "))
    assert line.endswith("|  in  |")


def test_the_page_is_what_the_table_says():
    file = ROOT / "docs" / "reference" / PAGE
    assert file.is_file() and file.read_text("utf-8") == page(), "run `make reference` and commit what it writes"


def test_commands_of_the_page_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in re.findall(r"`((?:make|python) [^`]+)`", page()):
        program, what = command.split()[:2]
        assert what in targets if program == "make" else what == "-m" or (ROOT / what).is_file(), command
