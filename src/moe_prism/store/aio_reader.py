"""Reads by the kernel itself (Linux native AIO): the thread that computes hands over a batch in one call and collects it later.

For small records. Waking a thread takes longer than reading one, and on few cores the threads that read take time from the one that
computes (docs/explanation/store.md has the figures).
Needs `O_DIRECT`: on anything else the kernel would read at once, while the caller waits.
"""

from __future__ import annotations

import os
import platform
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numba import njit, types
from torch import Tensor

from .checksum import checksum
from .native import FAILED, OK, REASONS, RUN, SHORT, WRONG, Destination, Ints, widen_bfloat16
from .pack import Pack
from .reader import Item, RecordReader, is_direct
from .workers import WorkerReader

SMALL_RECORD = 1 << 18  # bytes up to which checking a record is no work worth another thread
PREADV = 7  # IOCB_CMD_PREADV, the kernel's number for this operation
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


class KernelQueue(NamedTuple):
    """A queue of the kernel's, and how to speak to it."""

    get_call: int  # number of the system call io_getevents
    submit_call: int  # of io_submit
    descriptor: int  # the packed file
    context: Ints  # [1] the kernel's name for the queue
    at_once: Ints  # [2] a time-out of nothing: seconds and nanoseconds


class ReadTable(NamedTuple):
    """Reads under way, by number, D at most. What is free is a stack: the last `free[0]` of free[1...]."""

    rows: Ints  # [D, columns] what each of them reads
    free: Ints  # [1 + D]
    left: Ints  # [D] reads under way of each job
    wrong: Ints  # [D RUN, 4] what the last call found to be wrong: job, key, slot, state


class KernelStructs(NamedTuple):
    """What the kernel wants to see of reads. Blocks hold the addresses of vectors, and pointers those of blocks, so nothing ever moves."""

    blocks: Ints  # [D, 8] one iocb each, of 64 bytes
    vectors: Ints  # [D, RUN, 2] the iovecs of each: address and length
    pointers: Ints  # [D] addresses of the blocks to submit
    events: Ints  # [D, 4] one io_event each: number of the read, address of its block, bytes read or error, unused


class ReadBatch(NamedTuple):
    """Records to read: keys ascending, the slot of each, the job each is part of, all of them exact or all int8."""

    keys: Ints
    slots: Ints
    jobs: Ints
    low: int


@njit(nogil=True, cache=True)
def take_in(ended: int, events: Ints, reads: ReadTable, target: Destination) -> int:
    """Check and widen what `ended` reads have brought; records that are not right go to `reads.wrong`. Returns how many are wrong."""
    form, table, bad = target.form, reads.rows, 0
    for e in range(ended):
        r, got = events[e, 0], events[e, 2]
        low = table[r, LOW]
        size = form.low_bytes if low else form.bytes
        skip = (form.bytes - size) // 8  # an int8 record lies at the end of its slot, so that it can be widened in place
        for i in range(table[r, COUNT]):
            key, slot = table[r, KEYS + i], table[r, SLOTS + i]
            state = OK
            if got < 0:
                state = FAILED
            elif got < (i + 1) * size:
                state = SHORT
            elif checksum(target.words[slot, skip:]) != target.sums[key + low * form.records]:
                state = WRONG
            elif low == 1 and form.widens:
                widen_bfloat16(target.bytes[slot], form.rows, form.hidden, form.bytes - form.low_bytes)
            if state != OK:
                wrong = reads.wrong[bad]
                wrong[0], wrong[1], wrong[2], wrong[3] = table[r, JOB], key, slot, state
                bad += 1
        reads.left[table[r, JOB]] -= 1
        reads.free[0] += 1
        reads.free[reads.free[0]] = r
    return bad


@njit(nogil=True, cache=True)
def begin(batch: ReadBatch, queue: KernelQueue, reads: ReadTable, kernel: KernelStructs, target: Destination) -> tuple[int, int]:
    """Begin to read a batch, neighbours of one job by one read; (records begun, records that are wrong already).

    Stops where no read is free.
    """
    keys, jobs, form, low = batch.keys, batch.jobs, target.form, batch.low
    size, base = (form.low_bytes, form.low_start) if low else (form.bytes, form.start)
    skip = (form.bytes - size) // 8
    words, stride = target.words.ctypes.data, target.words.shape[1]
    at, count = 0, 0
    while at < len(keys) and reads.free[0] > count:
        r = reads.free[reads.free[0] - count]
        row, vectors, block = reads.rows[r], kernel.vectors[r], kernel.blocks[r]
        first = at
        while at < len(keys) and at - first < RUN and keys[at] == keys[first] + at - first and jobs[at] == jobs[first]:
            vectors[at - first, 0] = words + 8 * (batch.slots[at] * stride + skip)
            vectors[at - first, 1] = size
            row[KEYS + at - first], row[SLOTS + at - first] = keys[at], batch.slots[at]
            at += 1
        row[JOB], row[COUNT], row[LOW] = jobs[first], at - first, low
        reads.left[jobs[first]] += 1
        # The fields of struct iocb: our name for the read, the operation and the file (two halves of one word), then where the
        # vectors are, how many, and the offset in the file. The others are zero.
        block[0], block[2] = r, PREADV + (queue.descriptor << 32)
        block[3], block[4] = kernel.vectors.ctypes.data + r * 16 * RUN, at - first
        block[5] = base + keys[first] * size
        kernel.pointers[count] = kernel.blocks.ctypes.data + 64 * r
        count += 1
    reads.free[0] -= count
    begun, here = 0, 0
    while begun < count:
        got = _system(queue.submit_call, queue.context[0], count - begun, kernel.pointers.ctypes.data + 8 * begun, 0, 0)
        if got <= 0:
            # The kernel takes none, for now or at all. One read is done here and then it is asked again, so this ends either way.
            r = (kernel.pointers[begun] - kernel.blocks.ctypes.data) // 64
            block = kernel.blocks[r]
            kernel.events[here, 0] = r
            kernel.events[here, 2] = _preadv(types.intc(queue.descriptor), block[3], types.intc(block[4]), block[5])
            here += 1
            got = 1
        begun += got
    return at, take_in(here, kernel.events, reads, target)


@njit(nogil=True, cache=True)
def collect(least: int, queue: KernelQueue, reads: ReadTable, kernel: KernelStructs, target: Destination) -> int:
    """`take_in` of what has ended, after waiting for `least` reads."""
    events, until = kernel.events, 0 if least else queue.at_once.ctypes.data  # no time-out: wait for as long as it takes
    got = _system(queue.get_call, queue.context[0], least, len(events), events.ctypes.data, until)
    return take_in(max(0, got), events, reads, target)  # type: ignore[no-any-return]


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
        setup_, destroy_, get_call, submit_call = CALLS[platform.machine()]
        context = np.zeros(1, np.int64)
        if setup(setup_, DEPTH, context) < 0:
            os.close(self._descriptor)
            raise NoQueue
        self._end = weakref.finalize(self, destroy, destroy_, context)
        self._end.atexit = False  # the kernel takes a queue back when a process ends
        self._queue = KernelQueue(get_call, submit_call, self._descriptor, context, np.zeros(2, np.int64))
        free = np.arange(-1, DEPTH)
        free[0] = DEPTH
        rows, wrong = np.zeros((DEPTH, 3 + 2 * RUN), np.int64), np.zeros((DEPTH * RUN, 4), np.int64)
        self._reads = ReadTable(rows, free, np.zeros(DEPTH, np.int64), wrong)
        blocks, vectors = np.zeros((DEPTH, 8), np.int64), np.zeros((DEPTH, RUN, 2), np.int64)
        self._kernel = KernelStructs(blocks, vectors, np.zeros(DEPTH, np.int64), np.zeros((DEPTH, 4), np.int64))
        self._target = Destination.of(self.pack, self._bytes)
        self._jobs: dict[int, KernelJob] = {}
        self._unused = list(range(DEPTH))

    def read(self, keys: Ints, slots: Ints, *, low: bool = False, ahead: bool = False) -> list[KernelJob]:  # type: ignore[override]
        """One job for all that is wanted now; read ahead, one per record."""
        jobs: list[KernelJob] = []
        at = 0
        while at < len(keys):
            room = DEPTH if not ahead else len(self._unused)
            while not self._unused or not self._reads.free[0]:
                self.poll(1)
                room = len(self._unused)
            mine, places = keys[at : at + room], slots[at : at + room]
            # What is wanted now is waited for as a whole, so one job number does. Records read ahead end one by one.
            numbers = self._unused[-len(mine) :] if ahead else self._unused[-1:]
            del self._unused[-len(numbers) :]
            each = np.array(numbers if ahead else numbers * len(mine), np.int64)
            count, bad = begin(ReadBatch(mine, places, each, int(low)), self._queue, self._reads, self._kernel, self._target)
            parts = [slice(i, i + 1) for i in range(count)] if ahead else [slice(0, count)]
            begun = [KernelJob(mine[part], places[part], low, self) for part in parts]
            self._jobs.update(zip(numbers, begun, strict=False))
            self._unused += numbers[len(begun) :]
            jobs += begun
            at += count
            if bad or not self._reads.left[numbers[: len(begun)]].all():
                self._note(bad)
        return jobs

    def poll(self, least: int = 0) -> None:
        """Take note of reads that have ended, after waiting for so many of them."""
        self._note(collect(least, self._queue, self._reads, self._kernel, self._target))

    def _note(self, bad: int) -> None:
        """Try again what is wrong, and end the jobs that nothing is left of."""
        for number, key, _, state in self._reads.wrong[:bad].tolist():
            self._jobs[number].wrong[key] = REASONS[state]
        for number in [n for n in self._jobs if not self._reads.left[n]]:
            job = self._jobs.pop(number)
            self._unused.append(number)
            if job.wrong or (job.low and not self._target.form.widens):
                self._finish(job)
            job.over = True

    def _finish(self, job: KernelJob) -> None:
        for item in job.items:
            if item.key in job.wrong:
                self._again(job.failed, item, job.wrong[item.key])
            elif item.low and not self._target.form.widens:
                self._widen(item)

    def cancel(self, job: KernelJob) -> bool:  # type: ignore[override]
        """What the kernel has been told it reads."""
        return False

    def close(self) -> None:
        self._end()
        os.close(self._descriptor)


def open_reader(pack: Pack, arena: Tensor) -> RecordReader:
    """What a store reads with: the kernel for small records, else threads; elsewhere than on Linux they run Python between their reads."""
    if sys.platform == "linux" and platform.machine() in CALLS and pack.layout.bytes <= SMALL_RECORD and is_direct(pack.path):
        with suppress(NoQueue):
            return KernelReader(pack, arena)
    return WorkerReader(pack, arena) if hasattr(os, "eventfd") else RecordReader(pack, arena)
