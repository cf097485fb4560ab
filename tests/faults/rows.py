"""The rows of the reliability page, and what ties them to tests: `python -m tests.faults.rows docs/reference` writes reliability.md.

A test belongs to a row by its name, `test_f01_...`. The page lists what is found, so it cannot claim a row whose test does not exist;
test_rows.py says when it is stale. `reached` says what the tests assert, or what the named command printed.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = "reliability.md"
Tier = Literal["commit", "nightly", "release"]
TIERS: tuple[Tier, ...] = ("commit", "nightly", "release")
NAMED = re.compile(r"test_((?:[fsxd]\d\d_)+)")


@dataclass(frozen=True)
class Row:
    """fault: what happens; asked: the figure; reached: what is shown; short: what of the figure is not; command: beside the tests."""

    id: str
    fault: str
    asked: str
    reached: str
    short: str = ""
    command: str = ""


class Found(NamedTuple):
    """A test that names a row."""

    row: str
    file: str
    name: str
    tier: Tier


@cache
def found() -> tuple[Found, ...]:
    """Every test of the repository whose name begins with a row, or several."""
    return tuple(_found())


def _found() -> Iterator[Found]:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        module = ast.parse(path.read_text("utf-8"))
        for node in module.body:
            if isinstance(node, ast.FunctionDef) and (named := NAMED.match(node.name)):
                for row in named[1].strip("_").split("_"):
                    yield Found(row.upper(), path.relative_to(ROOT).as_posix(), node.name, _tier(node, module))


def tier_of(file: str, name: str) -> Tier:
    """Of one test, by its file from the repository's root and its function. LookupError where there is none of that name."""
    module = ast.parse((ROOT / file).read_text("utf-8"))
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _tier(node, module)
    raise LookupError(f"no test {name} in {file}")


def _tier(node: ast.FunctionDef, module: ast.Module) -> Tier:
    """By its own markers and those of its file. A test of which only some parameters are slow is one of the commit."""
    marks = [ast.unparse(d) for d in node.decorator_list]
    marks += [
        ast.unparse(n.value) for n in module.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"
    ]
    own = " ".join(mark for mark in marks if "parametrize" not in mark)
    return "release" if "mark.release" in own else "nightly" if "mark.slow" in own else "commit"


ROWS = tuple(Row(id=row, **said) for row, said in tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8")).items())


def page() -> str:
    """docs/reference/reliability.md."""
    tests = found()
    lines = [
        "<!-- Written by `make reference`. Do not edit. -->",
        "",
        "# Reliability",
        "",
        "What is broken on purpose, what must then hold, and what was seen. A row is here because tests carry its name. The figures are",
        "what those tests assert, or what the command beside them printed on two shared cores. What is short of a figure is said.",
        "",
        "| tier | when | command |",
        "|---|---|---|",
        "| commit | with every change | `make test` |",
        "| nightly | once a day: many kills, fuzzing, mutations | `make nightly` |",
        "| release | before a release: everything, audits, the wheel, clients | `make release` |",
        "",
        "One row alone, with its tests of all tiers: `python -m pytest tests -m '' -k f01`.",
        "",
        "| row | fault | asked | reached | tests, by tier |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        mine = [test for test in tests if test.row == row.id]
        reached = row.reached + (f". Short of it: {row.short}" if row.short else "")
        counts = ", ".join(f"{n} {tier}" for tier in TIERS if (n := sum(test.tier == tier for test in mine)))
        where = ", ".join(f"`{file}`" for file in sorted({test.file for test in mine}))
        run = f"; `{row.command}`" if row.command else ""
        lines.append(f"| {row.id} | {row.fault} | {row.asked} | {reached} | {counts} in {where}{run} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) / PAGE).write_text(page(), "utf-8")
