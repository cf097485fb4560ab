"""Write files so that a reader, or a run after a kill, meets the old content or the new, never a part."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UsageError


def check_writable(*files: Path | None) -> None:
    """UsageError before an hour of work, not after it, where one of these files could not be written."""
    for file in files:
        if file is not None and (file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK)):
            raise UsageError(f"cannot write {file}", "name a file in a folder that exists and can be written")


def check_writable_folder(folder: Path | None) -> None:
    """The same for a folder that is made with its parents where it is missing."""
    if folder is not None:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UsageError(f"cannot write into {folder}", "name a folder that can be written")


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` through a temporary neighbour, fsync and one rename; the folder is synced too."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
