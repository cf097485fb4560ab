"""Every MoE family of the installed transformers: found, permuted and split without a change of its output."""

from __future__ import annotations

import pytest
import transformers
from _pytest.mark import ParameterSet

from . import table
from .families import CLASSES, NEWER, NOT_TAKEN, OVERRIDES, UNSUPPORTED, names

FAMILIES = names()
AT_LEAST = 45


def documented() -> tuple[str, dict[str, tuple[str, ...]]]:
    return table.read() if table.PATH.is_file() else ("", {})


def each() -> list[ParameterSet]:
    """A family that the table does not know, the first of each layout and routing that it does, and the others by night."""
    rows, known, found = documented()[1], set[tuple[str, ...]](), list[ParameterSet]()
    for family in FAMILIES:
        kind = (rows[family][2], rows[family][4]) if family in rows else (family,)
        found.append(pytest.param(family, marks=pytest.mark.slow if kind in known else ()))
        known.add(kind)
    return found


@pytest.mark.parametrize("family", each())
def test_parity(family: str) -> None:
    result = table.attempt(family)
    if family in UNSUPPORTED:
        assert result is None or result.problems, f"{family} passes now: take it out of UNSUPPORTED"
        pytest.skip(f"unsupported: {UNSUPPORTED[family]}")
    assert result is not None
    assert not result.problems, result
    version, rows = documented()
    if version == transformers.__version__:
        errors = slice(5, 7)
        expected = list(table.row(family, result))
        actual = list(rows[family])
        expected[errors] = actual[errors] = []
        assert actual == expected, "docs/families.md is out of date: python -m tests.parity.table"


def test_enough_families_pass() -> None:
    """Each family that is not listed as unsupported passes above, so counting the list is enough."""
    assert len(set(FAMILIES) - set(UNSUPPORTED)) >= AT_LEAST


def test_the_document_lists_the_installed_families() -> None:
    version, rows = documented()
    if version != transformers.__version__:
        pytest.skip(f"docs/families.md was written with transformers {version}, installed is {transformers.__version__}")
    assert sorted(rows) == FAMILIES
    text = table.PATH.read_text("utf-8")
    assert all(f"| {family} | {module} | {reason} |" in text for family, (module, reason) in NOT_TAKEN.items())
    for family, cells in rows.items():
        assert cells[-1] == (f"unsupported: {UNSUPPORTED[family]}" if family in UNSUPPORTED else "ok")


def test_no_exception_is_left_over() -> None:
    """A family that was renamed or dropped leaves no settings behind."""
    if not transformers.__version__.startswith("5.19."):
        pytest.skip("the settings cover several versions of transformers; checked on one")
    assert set(OVERRIDES) | set(CLASSES) | set(UNSUPPORTED) <= set(FAMILIES) | NEWER
