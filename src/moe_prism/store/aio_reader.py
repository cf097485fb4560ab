"""Reads by the kernel itself (Linux native AIO): the thread that computes hands over a batch in one call and collects it later.

For small records. Waking a thread takes longer than reading one, and on few cores the threads that read take time from the one that
computes (docs/store.md has the figures). Needs `O_DIRECT`: on anything else the kernel would read at once, while the caller waits.
"""

from __future__ import annotations

import os
import platform
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numba import njit, types
from numpy.typing import NDArray
from torch import Tensor

from .checksum import checksum
from .native import FAILED, OK, REASONS, SHORT, WRONG, Ints, Words, widen_bfloat16
from .pack import Pack
from .reader import RUN, Item, RecordReader, is_direct
from .workers import WorkerReader

Bytes = NDArray[np.uint8]

SMALL = 1 << 18  # bytes of a record up to which checking it is no work worth another thread
PREADV = 7  # what the kernel calls it
DEPTH = 128  # reads under way at most
CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents and io_submit."""

JOB, COUNT, LOW, KEYS, SLOTS = 0, 1, 2, 3, 3 + RUN
"""Columns of the table of reads: the job it is part of, how many records, which form, their keys and slots."""

_system = types.ExternalFunction("syscall", types.intp(*[types.intp] * 6))
_preadv = types.ExternalFunction("preadv", types.intp(types.intc, types.intp, types.intc, types.int64))


@njit(nogil=True, cache=True)
def setup(call: int, depth: int, context: Ints) -> int:
    """context[0] = a new queue of the kernel's; negative where there is none to be had."""
    return _system(call, depth, context.ctypes.data, 0, 0, 0)  # type: ignore[no-any-return]


@njit(nogil=True, cache=True)
def destroy(call: int, context: Ints) -> int:
    """Wait for all reads and give the queue back."""
    return _system(call, context[0], 0, 0, 0, 0)  # type: ignore[no-any-return]


@njit(nogil=True, cache=True)
def take_in(
    count: int, events: Ints, form: Ints, words: Words, arena: Bytes, sums: Words, free: Ints, table: Ints, left: Ints, wrong: Ints
) -> int:  # fmt: skip
    """Check and widen what `count` ended reads have brought; records that are not right go to `wrong` [*, 4] as (job, key, slot, state).

    Returns how many are wrong. left: reads under way of each job.
    """
    bad = 0
    for e in range(count):
        r, got = events[e, 0], events[e, 2]
        low = table[r, LOW]
        size = form[2 + low]
        skip = (form[2] - size) // 8
        for i in range(table[r, COUNT]):
            key, slot = table[r, KEYS + i], table[r, SLOTS + i]
            state = OK
            if got < 0:
                state = FAILED
            elif got < (i + 1) * size:
                state = SHORT
            elif checksum(words[slot, skip:]) != sums[key + low * form[4]]:
                state = WRONG
            elif low == 1 and form[7] == 1:
                widen_bfloat16(arena[slot], form[5], form[6], form[2] - form[3])
            if state != OK:
                wrong[bad, 0], wrong[bad, 1], wrong[bad, 2], wrong[bad, 3] = table[r, JOB], key, slot, state
                bad += 1
        left[table[r, JOB]] -= 1
        free[0] += 1
        free[free[0]] = r
    return bad


@njit(nogil=True, cache=True)
def begin(
    numbers: Ints, context: Ints, keys: Ints, slots: Ints, low: int, jobs: Ints, form: Ints, words: Words, arena: Bytes, sums: Words,
    free: Ints, table: Ints, left: Ints, wrong: Ints, blocks: Ints, vectors: Ints, pointers: Ints, events: Ints,
) -> tuple[int, int]:  # fmt: skip
    """Begin to read `keys` (ascending) into `slots`, neighbours of one job by one read; (records begun, records that are wrong already).

    numbers: system calls and the descriptor; form: as `workers.work`; free: free[0] of the reads free[1...] are unused; blocks [D, 8],
    vectors [D, RUN, 2], pointers, events: what the kernel wants to see of each. Stops where no read is free.
    """
    size = form[2 + low]
    skip = (form[2] - size) // 8
    at, reads = 0, 0
    while at < len(keys) and free[0] > reads:
        r = free[free[0] - reads]
        first = at
        while at < len(keys) and at - first < RUN and keys[at] == keys[first] + at - first and jobs[at] == jobs[first]:
            vectors[r, at - first, 0] = words.ctypes.data + 8 * (slots[at] * words.shape[1] + skip)
            vectors[r, at - first, 1] = size
            table[r, KEYS + at - first], table[r, SLOTS + at - first] = keys[at], slots[at]
            at += 1
        table[r, JOB], table[r, COUNT], table[r, LOW] = jobs[first], at - first, low
        left[jobs[first]] += 1
        blocks[r, 0], blocks[r, 2] = r, PREADV + (numbers[4] << 32)
        blocks[r, 3], blocks[r, 4] = vectors.ctypes.data + r * 16 * RUN, at - first
        blocks[r, 5] = form[low] + keys[first] * size
        pointers[reads] = blocks.ctypes.data + 64 * r
        reads += 1
    free[0] -= reads
    begun, here = 0, 0
    while begun < reads:
        got = _system(numbers[3], context[0], reads - begun, pointers.ctypes.data + 8 * begun, 0, 0)
        if got <= 0:  # the kernel takes no more: read one here
            r = (pointers[begun] - blocks.ctypes.data) // 64
            events[here, 0] = r
            events[here, 2] = _preadv(types.intc(numbers[4]), blocks[r, 3], types.intc(blocks[r, 4]), blocks[r, 5])
            here += 1
            got = 1
        begun += got
    return at, take_in(here, events, form, words, arena, sums, free, table, left, wrong)


@njit(nogil=True, cache=True)
def collect(
    least: int, numbers: Ints, context: Ints, zero: Ints, events: Ints, form: Ints, words: Words, arena: Bytes, sums: Words,
    free: Ints, table: Ints, left: Ints, wrong: Ints,
) -> int:  # fmt: skip
    """`take_in` of what has ended, after waiting for `least` reads."""
    got = _system(numbers[2], context[0], least, len(events), events.ctypes.data, 0 if least else zero.ctypes.data)
    return take_in(max(0, got), events, form, words, arena, sums, free, table, left, wrong)  # type: ignore[no-any-return]


class NoQueue(Exception):
    """The kernel gives no queue: it has none, or too many are in use."""


@dataclass
class KernelJob:
    """As `reader.Job`; what failed is tried again when its end is noticed."""

    keys: Ints
    slots: Ints
    low: bool
    reader: KernelReader
    failed: dict[int, str] = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)
    over: bool = False

    @property
    def items(self) -> list[Item]:
        return [Item(key, slot, self.low) for key, slot in zip(self.keys.tolist(), self.slots.tolist(), strict=True)]

    @property
    def count(self) -> int:
        return len(self.keys)

    @property
    def done(self) -> bool:
        """As far as `KernelReader.poll` has noticed."""
        return self.over

    def wait(self) -> None:
        while not self.over:
            self.reader.poll(1)


class KernelReader(RecordReader):
    """`RecordReader` without threads; `open_reader` says where. Raises NoQueue."""

    def _start(self, threads: int) -> None:
        layout = self.pack.layout
        setup_, destroy_, events_, submit_ = CALLS[platform.machine()]
        self._numbers = np.array([setup_, destroy_, events_, submit_, self._descriptor], np.int64)
        self._context = np.zeros(1, np.int64)
        if setup(setup_, DEPTH, self._context) < 0:
            os.close(self._descriptor)
            raise NoQueue
        self._end = weakref.finalize(self, destroy, destroy_, self._context)
        self._end.atexit = False
        self._widens = layout.dtype == "bfloat16" and not layout.has_bias
        form = [self.pack.start, self.pack.low_start, layout.bytes, layout.low_bytes, len(self.pack.space)]
        self._form = np.array([*form, layout.rows, layout.hidden, self._widens], np.int64)
        self._sums = np.array(self.pack.sums)
        self._free = np.arange(-1, DEPTH)
        self._free[0] = DEPTH
        self._table = np.zeros((DEPTH, 3 + 2 * RUN), np.int64)
        self._blocks, self._vectors = np.zeros((DEPTH, 8), np.int64), np.zeros((DEPTH, RUN, 2), np.int64)
        self._pointers, self._events = np.zeros(DEPTH, np.int64), np.zeros((DEPTH, 4), np.int64)
        self._left, self._wrong, self._zero = (
            np.zeros(DEPTH, np.int64),
            np.zeros((DEPTH * RUN, 4), np.int64),
            np.zeros(2, np.int64),
        )
        self._jobs: dict[int, KernelJob] = {}
        self._unused = list(range(DEPTH))

    def read(self, keys: Ints, slots: Ints, *, low: bool = False, ahead: bool = False) -> list[KernelJob]:  # type: ignore[override]
        """One job for all that is wanted now; read ahead, one per record."""
        jobs: list[KernelJob] = []
        at = 0
        while at < len(keys):
            room = DEPTH if not ahead else len(self._unused)
            while not self._unused or not self._free[0]:
                self.poll(1)
                room = len(self._unused)
            mine, places = keys[at : at + room], slots[at : at + room]
            numbers = self._unused[-len(mine) :] if ahead else self._unused[-1:]
            del self._unused[-len(numbers) :]
            each = np.array(numbers if ahead else numbers * len(mine), np.int64)
            count, bad = begin(
                self._numbers, self._context, mine, places, int(low), each, self._form, self._words, self._bytes,
                self._sums, self._free, self._table, self._left, self._wrong, self._blocks, self._vectors, self._pointers, self._events,
            )  # fmt: skip
            parts = [slice(i, i + 1) for i in range(count)] if ahead else [slice(0, count)]
            begun = [KernelJob(mine[part], places[part], low, self) for part in parts]
            self._jobs.update(zip(numbers, begun, strict=False))
            self._unused += numbers[len(begun) :]
            jobs += begun
            at += count
            if bad or not self._left[numbers[: len(begun)]].all():
                self._note(bad)
        return jobs

    def poll(self, least: int = 0) -> None:
        """Take note of reads that have ended, after waiting for so many of them."""
        bad = collect(
            least, self._numbers, self._context, self._zero, self._events, self._form, self._words, self._bytes, self._sums,
            self._free, self._table, self._left, self._wrong,
        )  # fmt: skip
        self._note(bad)

    def _note(self, bad: int) -> None:
        """Try again what is wrong, and end the jobs that nothing is left of."""
        for number, key, _, state in self._wrong[:bad].tolist():
            self._jobs[number].wrong[key] = REASONS[state]
        for number in [n for n in self._jobs if not self._left[n]]:
            job = self._jobs.pop(number)
            self._unused.append(number)
            if job.wrong or (job.low and not self._widens):
                self._finish(job)
            job.over = True

    def _finish(self, job: KernelJob) -> None:
        for item in job.items:
            if item.key in job.wrong:
                self._again(job.failed, item, job.wrong[item.key])
            elif item.low and not self._widens:
                self._widen(item)

    def cancel(self, job: KernelJob) -> bool:  # type: ignore[override]
        """What the kernel has been told it reads."""
        return False

    def close(self) -> None:
        self._end()
        os.close(self._descriptor)


def open_reader(pack: Pack, arena: Tensor) -> RecordReader:
    """What a store reads with: the kernel for small records, else threads; elsewhere than on Linux they run Python between their reads."""
    if sys.platform == "linux" and platform.machine() in CALLS and pack.layout.bytes <= SMALL and is_direct(pack.path):
        with suppress(NoQueue):
            return KernelReader(pack, arena)
    return WorkerReader(pack, arena) if hasattr(os, "eventfd") else RecordReader(pack, arena)
