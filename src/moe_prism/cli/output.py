"""Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import PrismError, UsageError
from ..tally import TextTally, watch_reading

QUIET_SECONDS = 10.0  # between plain progress lines when stderr is no terminal


def plain_line(text: str) -> str:
    """One line without box drawing."""
    return " ".join(text.replace("│", " ").split())


_read: dict[str, dict[str, Any]] = {}
"""What was left out of the text that this command read: line for people -> plain values."""


@contextmanager
def noted_reading() -> Iterator[None]:
    """Inside, a line on stderr says what is left out of a text when it is read, once; `emit` adds it to JSON."""
    _read.clear()

    def see(tally: TextTally) -> None:
        line = tally.line()
        if line and line not in _read:
            note(line)
            _read[line] = tally.to_json()

    with watch_reading(see):
        yield


def emit(result: dict[str, Any], text: str, as_json: bool) -> None:
    """The command's result: one JSON object, with what was left out of the text it read, or the text."""
    if _read:
        result = {**result, "read": list(_read.values())}
    sys.stdout.write((json.dumps(result, default=str) if as_json else text.rstrip()) + "\n")


class Unwritten(PrismError):
    """What could not be written is on stdout instead."""


@contextmanager
def written(result: dict[str, Any], text: str, as_json: bool) -> Iterator[None]:
    """Emit the result of long work after the block that writes its files, and also where that fails: a full disk costs only the files."""
    try:
        yield
    except (OSError, UsageError) as error:
        emit(result, text, as_json)
        cause = error.cause if isinstance(error, UsageError) else f"cannot write: {error.strerror or error}"
        raise Unwritten(cause, "the result is on stdout; free some space and run it again for its files") from error
    emit(result, text, as_json)


def note(text: str) -> None:
    """A line for people, on stderr."""
    sys.stderr.write(text + "\n")


def note_left_out(left: Mapping[str, str]) -> None:
    """What of a source does not lie in the output, for people."""
    for name, reason in left.items():
        note(f"left out: {name} ({reason})")


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned with spaces: numbers right, text left; pastes into an issue."""
    cells = [[str(c) for c in row] for row in [headers, *rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(headers))]
    right = [all(_is_number(r[i]) for r in cells[1:]) for i in range(len(headers))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip() for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _is_number(text: str) -> bool:
    return text.strip().rstrip("%xBKMG").replace(".", "").replace("-", "").replace("e", "").isdigit() or text in ("", "-")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line every ten seconds elsewhere; both on stderr. Yields update(done, total)."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    began = last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > QUIET_SECONDS:
            last = time.monotonic()
            note(f"{title}: {done}/{total} ({last - began:.0f} s)")

    yield update
