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
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import PrismError, UsageError
from .checksum import checksum
from .layout import RecordLayout
from .native import OK, REASONS, RUN, Ints, read_records, widen_bfloat16
from .pack import Pack

THREADS = 4
SHARE = 2  # records per job at least: waking a thread costs about as much as reading a small record
TRIES = 4
PAUSE = 0.002  # seconds before the second try, doubled for each further one

ReadFn = Callable[[int, Sequence[memoryview], int], int]
"""A test's version of os.preadv: (descriptor, buffers, offset) -> bytes read."""


class StoreError(PrismError):
    """A sub-expert that a request needs cannot be had. The request fails; the store goes on."""


class Item(NamedTuple):
    """One record to read into a slot of the arena; low: the int8 form, widened on arrival."""

    key: int
    slot: int
    low: bool = False


@dataclass
class ReadJob:
    """Records for one thread to read, in file order. `failed`: the keys that could not be read, with the reason."""

    items: list[Item]
    ahead: bool
    failed: dict[int, str] = field(default_factory=dict)
    cancelled: bool = False
    _open: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._open.acquire()

    @property
    def done(self) -> bool:
        return not self._open.locked()

    @property
    def count(self) -> int:
        return len(self.items)

    def finish(self) -> None:
        self._open.release()

    def wait(self) -> None:
        with self._open:
            pass


class RecordReader:
    """Reads records of one packed file into slots of an arena (uint8 [slots, bytes], page-aligned)."""

    def __init__(self, pack: Pack, arena: Tensor, *, threads: int = THREADS, read: ReadFn | None = None) -> None:
        self.pack, self._arena = pack, arena
        self._bytes: NDArray[np.uint8] = arena.numpy()
        self._words = self._bytes.view(np.uint64)
        self._read = read
        self._descriptor, self.direct = _open(pack)
        self._start(threads)

    def _start(self, threads: int) -> None:
        self._demand: deque[ReadJob] = deque()
        self._ahead: deque[ReadJob] = deque()
        self._work: SimpleQueue[None] = SimpleQueue()  # one entry per job: a lock of C, not of Python
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, daemon=True, name="moe-prism-read") for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def read(self, keys: Ints, slots: Ints, *, low: bool = False, ahead: bool = False) -> Sequence[ReadJob]:
        """Begin to read records (keys ascending) into slots, in int8 form if `low`. ahead: after everything that is asked for on demand."""
        return self.submit([Item(k, s, low) for k, s in zip(keys.tolist(), slots.tolist(), strict=True)], ahead=ahead)

    def submit(self, items: Sequence[Item], *, ahead: bool = False) -> list[ReadJob]:
        """`read`, shared out among the threads."""
        jobs = [ReadJob(share, ahead) for share in shares(items, len(self._threads))]
        queue = self._ahead if ahead else self._demand
        for job in jobs:
            queue.append(job)
            self._work.put(None)
        return jobs

    def poll(self) -> None:
        """Take note of jobs that have ended, where nobody else does."""

    def cancel(self, job: ReadJob) -> bool:
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
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._descriptor)

    def _serve(self) -> None:
        while True:
            self._work.get()
            if self._closed:
                return
            job = self._next()
            if job is None:
                continue
            try:
                self._run(job)
            except Exception as error:  # noqa: BLE001 - whatever happens, nobody may wait for ever
                job.failed = {item.key: f"{type(error).__name__}: {error}" for item in job.items}
            job.finish()

    def _next(self) -> ReadJob | None:
        for queue in (self._demand, self._ahead):
            try:
                return queue.popleft()
            except IndexError:  # empty, or its job was cancelled
                continue
        return None

    def _run(self, job: ReadJob) -> None:
        wrong: dict[int, str] = {}
        if self._read is None:
            wrong = self._native(job.items)
        else:
            for run in runs(job.items):
                wrong |= self._attempt(run, self._read)
        for item in [i for i in job.items if i.key in wrong]:
            self._again(job.failed, item, wrong[item.key])

    def _again(self, failed: dict[int, str], item: Item, reason: str) -> None:
        """The further tries of one record; into `failed` if all of them fail."""
        pause = PAUSE
        for _ in range(TRIES - 1):
            time.sleep(pause)
            pause *= 2
            found = self._attempt([item], self._read or os.preadv)
            if not found:
                return
            reason = found[item.key]
        failed[item.key] = reason

    def _native(self, items: Sequence[Item]) -> dict[int, str]:
        """All items of a job, which are of one form; what is wrong, by key."""
        low, layout = items[0].low, self.pack.layout
        size = layout.low_bytes if low else layout.bytes
        keys, slots = np.array([i.key for i in items]), np.array([i.slot for i in items])
        start, offset = (self.pack.low_start, len(self.pack.space)) if low else (self.pack.start, 0)
        sums = self.pack.sums[keys + offset]
        skip = (layout.bytes - size) // 8
        found = read_records(self._descriptor, self._words, slots, start + keys * size, skip, sums)
        if low:
            for item, state in zip(items, found.tolist(), strict=True):
                if state == OK:
                    self._widen(item)
        return {item.key: REASONS[state] for item, state in zip(items, found.tolist(), strict=True) if state != OK}

    def _widen(self, item: Item) -> None:
        layout = self.pack.layout
        if layout.dtype == "bfloat16" and not layout.has_bias:
            widen_bfloat16(self._bytes[item.slot], layout.rows, layout.hidden, layout.bytes - layout.low_bytes)
        else:
            assert isinstance(layout, RecordLayout)  # planes have no other form
            layout.raise_(self._arena[item.slot])

    def _attempt(self, items: Sequence[Item], read: ReadFn) -> dict[int, str]:
        """One call for a run; what is wrong, by key."""
        first, layout = items[0], self.pack.layout
        size = layout.low_bytes if first.low else layout.bytes
        buffers = [self._bytes[item.slot, layout.bytes - size :].data for item in items]
        try:
            got = read(self._descriptor, buffers, self.pack.place(first.key, first.low))
        except OSError as error:
            return dict.fromkeys((i.key for i in items), error.strerror or str(error))
        wrong = {}
        for at, item in enumerate(items):
            if got < (at + 1) * size:
                wrong[item.key] = "the file is cut short"
            elif not self._verified(item, size):
                wrong[item.key] = "wrong checksum"
            elif item.low:
                self._widen(item)
        return wrong

    def _verified(self, item: Item, size: int) -> bool:
        words = self._words[item.slot, (self.pack.layout.bytes - size) // 8 :]
        number = item.key + (len(self.pack.space) if item.low else 0)
        return bool(checksum(words) == self.pack.sums[number])


def shares(items: Sequence[Item], threads: int) -> list[list[Item]]:
    """Items in file order, cut into at most as many parts as there are threads, of one form and at least SHARE items each."""
    found: list[list[Item]] = []
    for low in (False, True):
        own = sorted((i for i in items if i.low == low), key=lambda i: i.key)
        parts = max(1, min(threads, len(own) // SHARE))
        bounds = [len(own) * p // parts for p in range(parts + 1)]
        found += [own[a:b] for a, b in pairwise(bounds) if b > a]
    return found


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


def is_direct(path: Path) -> bool:
    """Whether a file can be read past the page cache."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
