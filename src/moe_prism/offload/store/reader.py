"""Asynchronous reads of records into the arena: threads and `preadv`, past the page cache where the file system allows.

A read is tried again when it fails or its checksum is wrong; what still fails is an error that names the file and the sub-expert.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import PrismError, UsageError
from .checksum import checksum
from .pack import Pack

THREADS = 4
RUN = 8  # neighbouring records read by one call at most
TRIES = 4
PAUSE = 0.002  # seconds before the second try, doubled for each further one

ReadFn = Callable[[int, Sequence[memoryview], int], int]
"""os.preadv, or a test's version of it: (descriptor, buffers, offset) -> bytes read."""


class StoreError(PrismError):
    """A sub-expert that a request needs cannot be had. The request fails; the store goes on."""


class Item(NamedTuple):
    """One record to read into a slot of the arena; low: the int8 form, widened on arrival."""

    key: int
    slot: int
    low: bool = False


@dataclass
class Job:
    """A run of records that lie one after the other in the file. `failed`: the keys that could not be read, with the reason."""

    items: list[Item]
    ahead: bool
    failed: dict[int, str] = field(default_factory=dict)
    cancelled: bool = False
    seconds: float = 0.0
    _open: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._open.acquire()

    @property
    def done(self) -> bool:
        return not self._open.locked()

    def finish(self) -> None:
        self._open.release()

    def wait(self) -> None:
        with self._open:
            pass


class Reader:
    """Reads records of one packed file into slots of an arena (uint8 [slots, bytes], page-aligned)."""

    def __init__(self, pack: Pack, arena: Tensor, *, threads: int = THREADS, read: ReadFn | None = None) -> None:
        self.pack, self._arena = pack, arena
        self._bytes: NDArray[np.uint8] = arena.numpy()
        self._words = self._bytes.view(np.uint64)
        self._read: ReadFn = read or os.preadv
        self._descriptor, self.direct = _open(pack)
        self._demand: deque[Job] = deque()
        self._ahead: deque[Job] = deque()
        self._work = threading.Semaphore(0)
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, daemon=True, name="moe-prism-read") for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, items: Sequence[Item], *, ahead: bool = False) -> list[Job]:
        """Begin to read; neighbours in the file are read together. ahead: after everything that is asked for on demand."""
        jobs = [Job(run, ahead) for run in runs(items)]
        queue = self._ahead if ahead else self._demand
        for job in jobs:
            queue.append(job)
            self._work.release()
        return jobs

    def cancel(self, job: Job) -> bool:
        """Take back a job that no thread has begun; False if it is too late."""
        try:
            (self._ahead if job.ahead else self._demand).remove(job)
        except ValueError:
            return False
        job.cancelled = True
        job.finish()
        return True

    def close(self) -> None:
        """End the threads, then close the file."""
        self._closed = True
        for _ in self._threads:
            self._work.release()
        for thread in self._threads:
            thread.join()
        os.close(self._descriptor)

    def _serve(self) -> None:
        while True:
            self._work.acquire()
            if self._closed:
                return
            job = self._next()
            if job is None:
                continue
            began = time.perf_counter()
            try:
                self._run(job)
            except Exception as error:  # noqa: BLE001 - whatever happens, nobody may wait for ever
                job.failed = {item.key: f"{type(error).__name__}: {error}" for item in job.items}
            job.seconds = time.perf_counter() - began
            job.finish()

    def _next(self) -> Job | None:
        for queue in (self._demand, self._ahead):
            try:
                return queue.popleft()
            except IndexError:  # empty, or its job was cancelled
                continue
        return None

    def _run(self, job: Job) -> None:
        wrong = self._attempt(job.items)
        for item in [i for i in job.items if i.key in wrong]:  # each of them alone from now on
            pause, reason = PAUSE, wrong[item.key]
            for _ in range(TRIES - 1):
                time.sleep(pause)
                pause *= 2
                found = self._attempt([item])
                if not found:
                    break
                reason = found[item.key]
            else:
                job.failed[item.key] = reason

    def _attempt(self, items: Sequence[Item]) -> dict[int, str]:
        """One call for a run; what is wrong, by key."""
        first, layout = items[0], self.pack.layout
        size = layout.low_bytes if first.low else layout.bytes
        buffers = [memoryview(self._bytes[item.slot, layout.bytes - size :]) for item in items]
        try:
            got = self._read(self._descriptor, buffers, self.pack.place(first.key, first.low))
        except OSError as error:
            return dict.fromkeys((i.key for i in items), error.strerror or str(error))
        wrong = {}
        for at, item in enumerate(items):
            if got < (at + 1) * size:
                wrong[item.key] = "the file is cut short"
            elif not self._verified(item, size):
                wrong[item.key] = "wrong checksum"
            elif item.low:
                layout.raise_(self._arena[item.slot])
        return wrong

    def _verified(self, item: Item, size: int) -> bool:
        words = self._words[item.slot, (self.pack.layout.bytes - size) // 8 :]
        number = item.key + (len(self.pack.space) if item.low else 0)
        return bool(checksum(words) == self.pack.sums[number])


def runs(items: Sequence[Item]) -> list[list[Item]]:
    """Items cut into runs of neighbours in the file, at most RUN each, keys ascending."""
    found: list[list[Item]] = []
    for item in sorted(items, key=lambda i: (i.low, i.key)):
        last = found[-1][-1] if found else None
        if last is not None and (last.low, last.key + 1) == (item.low, item.key) and len(found[-1]) < RUN:
            found[-1].append(item)
        else:
            found.append([item])
    return found


def _open(pack: Pack) -> tuple[int, bool]:
    """(descriptor, whether reads go past the page cache)."""
    try:
        direct = os.open(pack.path, os.O_RDONLY | os.O_DIRECT)
        return direct, True
    except OSError:
        pass  # the file system does not know direct reads
    try:
        plain = os.open(pack.path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"cannot open '{pack.path}': {error.strerror}", "check the file") from error
    os.posix_fadvise(plain, 0, 0, os.POSIX_FADV_RANDOM)
    return plain, False
