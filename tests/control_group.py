"""A control group of a test's own, below that of this process, with a limit on memory that the kernel keeps."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_prism.memory import GROUPS

VERSIONS = (("memory.limit_in_bytes", ("rss", "shmem")), ("memory.max", ("anon", "shmem")))
"""Of control groups, 1 and 2: the file of the limit, and what of `memory.stat` nobody can drop."""


class ControlGroup:
    """limit: bytes. `peak` is the most that was seen of what cannot be dropped, looked at a hundred times a second."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self.limit, self.peak = folder, limit, 0
        name, self._held = next((name, held) for name, held in VERSIONS if (folder / name).is_file())
        (folder / name).write_text(str(limit))
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def enter(self) -> None:
        """The calling process belongs to it from now on: for `preexec_fn`."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        self._stop.set()
        self._watch.join()
        for _ in range(100):  # the kernel may still be taking the last process out
            try:
                self._folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            rows = (line.split() for line in (self._folder / "memory.stat").read_text().splitlines())
            self.peak = max(self.peak, sum(int(row[1]) for row in rows if row[0] in self._held))


@contextmanager
def control_group(limit: int) -> Iterator[ControlGroup]:
    """Skips the test where none can be made."""
    folder = next((place / f"moe-prism-{uuid.uuid4().hex[:8]}" for place in _own_groups() if os.access(place, os.W_OK)), None)
    try:
        if folder is None:
            raise OSError("no group of this process can be written to")
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    if not any((folder / name).is_file() for name, _ in VERSIONS):
        folder.rmdir()
        pytest.skip("control groups have no limit on memory here")
    group = ControlGroup(folder, limit)
    try:
        yield group
    finally:
        group.close()


def _own_groups() -> Iterator[Path]:
    """Folders of the groups that this process is in and that count memory."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if "memory" in kinds.split(","):
            yield GROUPS / "memory" / path.lstrip("/")
        elif number == "0":
            yield GROUPS / path.lstrip("/")
