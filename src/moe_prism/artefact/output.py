"""What is looked at before an output folder is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from ..checkpoint import read_manifest
from ..checkpoint.atomic import JOURNAL
from ..checkpoint.manifest import MANIFEST
from ..errors import UsageError
from ..progress import Report


class Writing(TypedDict, total=False):
    """How a job goes about the folder it writes.

    resume: continue an interrupted run, in the same bytes; force: replace an existing output; report: hears of its progress.
    """

    resume: bool
    force: bool
    report: Report


def check_apart(source: str | Path, out: str | Path) -> None:
    """UsageError if OUT and the source lie in each other: replacing OUT must never touch the source."""
    here, there = Path(source).resolve(), Path(out).expanduser().resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError(f"output '{out}' and source '{source}' overlap", "choose an output path outside the source")


def finished(out: str | Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a complete `out` that was made from the same inputs (`wanted`, keys of its manifest), else None.

    So `--resume` finds nothing to do where the earlier run was killed after its work had become visible.
    Raises CorruptError for a damaged prism.json.
    """
    folder = Path(out).expanduser()
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    same = all(manifest.get(key) == value for key, value in json.loads(json.dumps(wanted)).items())
    if not same:
        return None  # the output folder then says that it exists
    (folder / JOURNAL).unlink(missing_ok=True)  # killed between the rename and this last step
    return manifest
