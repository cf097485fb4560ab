"""Rows of a benchmark, shown as they are measured; and the arguments of those that go through models and domains."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def printed(rows: Iterable[dict[str, Any]], show: Callable[[dict[str, Any]], str], quiet: bool) -> list[dict[str, Any]]:
    """All rows, each shown on a line of its own as soon as it is there, unless `quiet`: then the caller prints them as JSON."""
    found = []
    for row in rows:
        found.append(row)
        if not quiet:
            print(show(row), flush=True)
    return found


def domain_arguments(doc: str | None, models: Sequence[str], domains: Sequence[str], tokens: int) -> argparse.ArgumentParser:
    """--models, --domains, --text, --tokens (of each domain), --length, --json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    names: dict[str, Any] = {"type": lambda text: text.split(","), "help": "comma-separated"}
    parser.add_argument("--models", default=list(models), **names)
    parser.add_argument("--domains", default=list(domains), **names)
    parser.add_argument("--text", default="domains", help="calibration text; its calibration side is used")
    parser.add_argument("--tokens", type=int, default=tokens, help="of each domain")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    return parser
