"""The first line of a long command: which text a model is calibrated and judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from ..progress import Report
from .output import note, progress

Asked = TypeVar("Asked")


def told_text(model: str | Path, options: Asked, what: str, more: str = "") -> tuple[Asked, Report]:
    """The options with their text filled in, and a progress that names it before anything else, once all checks have passed.

    A warning follows where the model seems made for other text.
    """
    from ..jobs.which_text import described, doubt, with_text

    found = with_text(options, model)
    source, tokens = found.source, found.tokens  # type: ignore[attr-defined]
    lines = [f"{what}: {described(source)}; {tokens} tokens{more}"]
    warning = doubt(model, source)
    if warning:
        lines.append(f"warning: {warning}")

    @contextmanager
    def report(title: str) -> Iterator[Callable[[int, int], None]]:
        while lines:
            note(lines.pop(0))
        with progress(title) as update:
            yield update

    return found, report
