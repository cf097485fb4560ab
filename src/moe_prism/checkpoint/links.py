"""Links out of a model's folder: not followed unless somebody says so, because the folder may come from anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError

VARIABLE = "MOE_PRISM_FOLLOW_LINKS"  # in the environment, so that processes which a command starts know it too


@contextmanager
def follow_links() -> Iterator[None]:
    """Inside, and in processes started there, links may lead out of a model's folder."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        os.environ.update({} if before is None else {VARIABLE: before})


def follows_links() -> bool:
    """Whether links that lead out are followed."""
    return os.environ.get(VARIABLE) == "1"


def leads_out(path: Path) -> bool:
    """Whether the file lies outside its folder. A hub cache keeps snapshots/<revision>/ as links into blobs/ beside it: those are in."""
    home, target = path.parent.resolve(), path.resolve()
    blobs = next((p.parent / "blobs" for p in (home, *home.parents) if p.name == "snapshots"), home)
    return target.parent not in (home, blobs)


def inside(path: Path) -> Path:
    """The path itself. UsageError where it is a link that leads out of its folder, unless links are followed."""
    if not follows_links() and leads_out(path):
        raise UsageError(
            f"'{path}' is a link that leads out of its folder, and as a safety rule such links are not followed",
            "add --follow-links if you trust the folder, or copy the file into it",
        )
    return path
