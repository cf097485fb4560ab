"""Change a finished folder: all of a change is there, or nothing of it, wherever the process was killed.

New files and the new prism.json are written beside each other in `.update/`. That its prism.json is there is the moment from which the
change counts: whoever opens the folder next finishes it. Before that moment nothing in the folder has changed. One lock, that of
`OutputFolder`, is held for every change.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UsageError
from ..files import replace_file, sync_folder
from .atomic import held
from .manifest import MANIFEST, UPDATE, changed_content, encoded, parse_manifest

PATIENCE = 60.0  # seconds that a change waits for another one
BRIEF = 5.0  # the same of somebody who only reads: what is left to do are renames


class FolderChange:
    """What is being changed. Files go to `work`; `commit` makes them visible with the new prism.json."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / UPDATE

    def commit(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Replace or add facts, take in the files of `work`, and list the folder's files again. Returns the new manifest.

        What was listed keeps the sha256 it was written with, so that a later change to it is still found by `verify`.
        """
        content = changed_content(self.folder, self.work, facts)
        replace_file(self.work / MANIFEST, encoded(content))
        _finish(self.folder)
        return content


@contextmanager
def changing(folder: str | Path) -> Iterator[FolderChange]:
    """The one way to change a finished folder. UsageError where another run is at it for long."""
    path = Path(folder).resolve()
    with held(path, PATIENCE):
        _settle(path)
        change = FolderChange(path)
        change.work.mkdir()
        try:
            yield change
        finally:
            if not (change.work / MANIFEST).is_file():  # else it counts, and somebody will finish it
                shutil.rmtree(change.work, ignore_errors=True)


def update_manifest(folder: str | Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Replace or add facts of a finished folder, and list files that lie in it and were not listed yet.

    The fact `caches` names files that are written again when they are missed: `verify` checks them, and does not ask for one that is gone.
    """
    with changing(folder) as change:
        return change.commit(facts)


def put_file(path: Path, data: bytes) -> None:
    """A file at once or not at all; in a finished folder as a change of it."""
    if (path.parent / MANIFEST).is_file():
        with changing(path.parent) as change:
            (change.work / path.name).write_bytes(data)
            change.commit({})
    else:
        replace_file(path, data)


def settle(folder: str | Path) -> None:
    """Finish a change that was interrupted when it counted already. CorruptError where that cannot be done."""
    path = Path(folder)
    if not (path / UPDATE / MANIFEST).is_file():
        return
    try:
        with held(path.resolve(), BRIEF):
            _settle(path.resolve())
    except (OSError, UsageError) as error:
        if (path / UPDATE / MANIFEST).is_file():  # nobody else has finished it meanwhile
            raise CorruptError(
                f"'{folder}': a change was interrupted and cannot be finished: {error}", "make the folder writable and try again"
            ) from error


def _settle(folder: Path) -> None:
    if (folder / UPDATE / MANIFEST).is_file():
        _finish(folder)
    shutil.rmtree(folder / UPDATE, ignore_errors=True)


def _finish(folder: Path) -> None:
    """Renames alone, prism.json last: done again from wherever they stopped, they end in the same folder."""
    work = folder / UPDATE
    if work.is_symlink():
        raise CorruptError(f"{work} is a link", "remove it")
    new = parse_manifest(work / MANIFEST)
    for path in sorted(work.iterdir()):
        if path.name == MANIFEST or ".tmp" in path.name:
            continue
        if path.is_symlink() or not path.is_file() or path.name not in new["files"]:
            raise CorruptError(f"{path} is no file of the change that it lies in", f"remove {work}")
    for path in sorted(work.iterdir()):
        if path.name != MANIFEST and ".tmp" not in path.name:
            path.rename(folder / path.name)
    sync_folder(folder)
    (work / MANIFEST).rename(folder / MANIFEST)
    sync_folder(folder)
