"""An output folder that is either complete or absent: built as `OUT.partial/`, renamed to OUT once, under a lock."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import DoesNotFit, UsageError
from ..files import sync_folder
from ..schema import is_file_name, is_inner_name

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL = "journal.json"


def check_output(out: str | Path, *, force: bool = False, resume: bool = False) -> None:
    """UsageError where `OutputFolder` would refuse OUT for what lies there. Nothing is touched."""
    given = Path(out).expanduser()
    if not is_file_name(given.name):
        raise UsageError(f"'{out}' is not a folder name", "choose another output path")
    work = given.with_name(given.name + ".partial")
    if given.is_symlink() or given.exists():
        if not force:
            raise UsageError(f"output '{given}' exists", "use --force to replace it, or choose another path")
        if not _replaceable(given):
            raise UsageError(f"'{given}' is not a model folder; it will not be replaced", "choose another path")
    if work.exists() and not (resume or force):
        raise UsageError(f"unfinished work exists at '{work}'", "use --resume to continue it or --force to start again")


class OutputFolder:
    """Where a command writes. Use as a context manager; only `finish()` makes the result visible.

    Files go to `work` (= `OUT.partial/`) through a temporary name, fsync and a rename. Leaving the block without `finish()` keeps
    `work` for `resume=True`. `force` allows an existing OUT (replaced only on success) and discards old partial work.
    UsageError: OUT exists, partial work exists and neither resume nor force was given, or another process (named by pid) is at it.
    """

    def __init__(self, out: str | Path, force: bool = False, resume: bool = False) -> None:
        # resolve the parent only: OUT itself may be a link, and is then refused below rather than followed
        given = Path(out).expanduser()
        self.out = given.parent.resolve() / given.name
        if not is_file_name(self.out.name):
            raise UsageError(f"'{out}' is not a folder name", "choose another output path")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.work = self.out.with_name(self.out.name + ".partial")
        self._aside = self.out.with_name(self.out.name + ".replaced")
        self._lock_path = self.out.with_name(self.out.name + ".lock")
        self.hashes: dict[str, str] = {}
        self._lock: BinaryIO | None = _lock(self._lock_path, self.out)
        try:
            self._prepare(force, resume)
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    def _prepare(self, force: bool, resume: bool) -> None:
        if self._aside.exists() and not self.out.exists():
            self._aside.rename(self.out)  # a kill between the two renames of finish(): the old state comes back
        if self.out.is_symlink() or self.out.exists():
            if not force:
                raise UsageError(f"output '{self.out}' exists", "use --force to replace it, or choose another path")
            if not _replaceable(self.out):
                raise UsageError(f"'{self.out}' is not a model folder; it will not be replaced", "choose another path")
        if self.work.exists() and not resume:
            if not force:
                raise UsageError(
                    f"unfinished work exists at '{self.work}'", "use --resume to continue it or --force to start again"
                )
            shutil.rmtree(self.work)
        self.work.mkdir(exist_ok=True)
        for orphan in self.work.rglob("*.tmp*"):
            orphan.unlink()

    @contextmanager
    def stage(self, name: str) -> Iterator[BinaryIO]:
        """Write one file, `a/b` into a folder; yields a handle on a temporary, in the end fsynced, hashed into `hashes` and renamed."""
        if not is_inner_name(name):
            raise UsageError(f"'{name}' is not a file name", "give a name inside the folder")
        temporary = self.work / f"{name}.tmp{os.getpid()}"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            temporary.rename(self.work / name)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DoesNotFit(f"disk full while writing '{name}' in '{self.work}'", "free space, then use --resume") from error
            raise
        for folder in {self.work, temporary.parent}:
            sync_folder(folder)
        self.hashes[name] = digest

    def write_bytes(self, name: str, data: bytes) -> str:
        """Write a file of this content; returns its sha256."""
        with self.stage(name) as file:
            file.write(data)
        return self.hashes[name]

    def link(self, source: Path, name: str) -> str:
        """A file that is there already, under this name, without a copy where the disk can do that; returns its sha256."""
        source = source.resolve()
        try:
            (self.work / name).unlink(missing_ok=True)
            os.link(source, self.work / name)
        except OSError:
            self.require_space(source.stat().st_size)
            with self.stage(name) as file, source.open("rb") as original:
                shutil.copyfileobj(original, file)
            return self.hashes[name]
        self.hashes[name] = sha256_file(self.work / name)
        return self.hashes[name]

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
        """Write a safetensors file; returns its sha256. Same tensors, same bytes. CorruptError if a value is not finite."""
        from .dtypes import NAMES  # folders are looked at without torch
        from .tensors import check_finite

        # widest elements first, as the reference writer does, so that every tensor is aligned in the file
        order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        position = 0
        for key in order:
            tensor = tensors[key]
            check_finite(key, tensor, name)
            end = position + tensor.numel() * tensor.element_size()
            header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.require_space(position + len(text))
        with self.stage(name) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                file.write(raw_bytes(tensors[key]))
        return self.hashes[name]

    def discard(self, name: str) -> None:
        """Remove a work file that is not part of the result."""
        (self.work / name).unlink(missing_ok=True)
        self.hashes.pop(name, None)

    def require_space(self, needed: int) -> None:
        """DoesNotFit if the disk has fewer free bytes than `needed`."""
        free = shutil.disk_usage(self.out.parent).free
        if free < needed:
            raise DoesNotFit(
                f"'{self.out.parent}' has {free} bytes free, {needed} are needed", "free space or choose another path"
            )

    def finish(self) -> Path:
        """Make the work visible as OUT by one rename (an old OUT steps aside first and is removed last). Returns OUT."""
        sync_folder(self.work)
        if self.out.exists():
            if self._aside.exists():
                shutil.rmtree(self._aside)
            self.out.rename(self._aside)
        self.work.rename(self.out)
        sync_folder(self.out.parent)
        # After the rename: killed here, OUT is complete and only carries one file that `verify` knows.
        (self.out / JOURNAL).unlink(missing_ok=True)
        if self._aside.exists():
            shutil.rmtree(self._aside)
        self._unlock()
        return self.out

    def _unlock(self) -> None:
        if self._lock is not None:
            _release(self._lock, self._lock_path)
            self._lock = None


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row order, as the safetensors payload stores them."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def held(folder: Path, patience: float) -> Iterator[None]:
    """Inside, nobody else writes this folder or changes it. UsageError after so many seconds of waiting; folder: resolved."""
    path, until = folder.with_name(folder.name + ".lock"), time.monotonic() + patience
    while True:
        try:
            lock = _lock(path, folder)
            break
        except UsageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        _release(lock, path)


def _release(lock: BinaryIO, path: Path) -> None:
    path.unlink(missing_ok=True)  # while held: a waiter notices that its file is gone and opens a new one
    lock.close()


def _lock(path: Path, out: Path) -> BinaryIO:
    """An exclusive lock that ends with the process and names it. filelock takes the same one, and cannot say who holds it."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            pid = file.read(20).decode("ascii", "replace") or "unknown"
            file.close()
            raise UsageError(f"another run (pid {pid}) is writing '{out}'", "wait for it, or choose another path") from error
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()  # the holder removed the file between our open and our lock
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()
    return file


def _replaceable(folder: Path) -> bool:
    """Only a model folder or an empty one is ever removed by force."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return any((folder / name).is_file() for name in ("config.json", "prism.json", "adapter.json")) or not any(folder.iterdir())
