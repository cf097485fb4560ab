"""Write files so that a reader, or a run after a kill, meets the old content or the new, never a part."""

from __future__ import annotations

import errno
import os
import stat
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


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a plain file. OSError where it is none (a pipe would never end) or holds more than `most` bytes."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is no plain file", str(path))
        if facts.st_size > most:
            raise OSError(errno.EFBIG, f"it has {facts.st_size} bytes, at most {most} are read", str(path))
        return file.read(most + 1)
