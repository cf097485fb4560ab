"""The first line of a long command: which text a model is calibrated and judged on."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from .output import note

Asked = TypeVar("Asked")


def told_text(model: str | Path, options: Asked, what: str, more: str = "") -> Asked:
    """The options with their text filled in, and a line on stderr that names it; a warning where the model seems made for other text."""
    from ..jobs.which_text import described, doubt, with_text

    found = with_text(options, model)
    source, tokens = found.source, found.tokens  # type: ignore[attr-defined]
    note(f"{what}: {described(source)}; {tokens} tokens{more}")
    warning = doubt(model, source)
    if warning:
        note(f"warning: {warning}")
    return found
