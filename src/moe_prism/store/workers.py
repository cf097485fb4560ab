"""RecordReader threads that never run Python once they have begun: jobs come through a pipe, results through memory.

A thread that needs the interpreter's lock to say that it is done makes the thread that computes wait for it, which costs more than a small
read (docs/explanation/store.md has the figures). What fails is tried again by the thread that asked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numba import njit, types
from torch import Tensor

from ..kernels.tiles import take
from .native import OK, REASONS, Destination, Ints, read_records, widen_bfloat16
from .pack import Pack
from .reader import THREADS, Item, RecordReader, shares

JOBS = 2048  # under way at most
ITEMS = 64  # of a job at most
COUNT, LOW, KEYS, SLOTS, FOUND = 0, 1, 2, 2 + ITEMS, 2 + 2 * ITEMS
"""Columns of the job table: how many records, which form, their keys and slots, and what became of them."""

_read = types.ExternalFunction("read", types.intp(types.intc, types.intp, types.intp))
_write = types.ExternalFunction("write", types.intp(types.intc, types.intp, types.intp))


class Descriptors(NamedTuple):
    """Open files of one thread."""

    pack: int  # the packed file
    jobs: int  # the pipe that job numbers come through
    ended: int  # the counter that is raised for every job that has ended


class JobTable(NamedTuple):
    """Jobs as compiled threads see them, by number."""

    rows: Ints  # [JOBS, columns] what to read, and what became of it
    tickets: Ints  # [JOBS] how many have asked for the job: the first one owns it
    done: Ints  # [JOBS] 1 = it has ended


@njit(nogil=True, cache=True)
def work(files: Descriptors, jobs: JobTable, target: Destination) -> None:
    """Serve jobs until a negative number comes."""
    message, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    table, form = jobs.rows, target.form
    while True:
        if _read(types.intc(files.jobs), message.ctypes.data, 8) != 8 or message[0] < 0:
            return
        job = message[0]
        # Cancelling takes a ticket too. The number of a cancelled job is still in the pipe, and here it is met and dropped.
        if take(jobs.tickets.ctypes.data + 8 * job) != 0:
            continue
        count, low = table[job, COUNT], table[job, LOW]
        keys, slots = table[job, KEYS : KEYS + count], table[job, SLOTS : SLOTS + count]
        size, base = (form.low_bytes, form.low_start) if low else (form.bytes, form.start)
        own = np.empty(count, np.uint64)
        for i in range(count):
            own[i] = target.sums[keys[i] + low * form.records]
        skip = (form.bytes - size) // 8  # an int8 record lies at the end of its slot, so that it can be widened in place
        found = read_records(types.intc(files.pack), target.words, slots.copy(), base + keys * size, skip, own)
        for i in range(count):
            if low == 1 and form.widens and found[i] == OK:
                widen_bfloat16(target.bytes[slots[i]], form.rows, form.hidden, form.bytes - form.low_bytes)
            table[job, FOUND + i] = found[i]
        # in this order: whoever is woken by the counter finds the job done
        jobs.done[job] = 1
        _write(types.intc(files.ended), one.ctypes.data, 8)


@dataclass
class WorkerJob:
    """As `reader.Job`; what failed is tried again when its end is noticed."""

    items: list[Item]
    ahead: bool
    reader: WorkerReader
    number: int
    failed: dict[int, str] = field(default_factory=dict)
    over: bool = False

    @property
    def count(self) -> int:
        return len(self.items)

    @property
    def done(self) -> bool:
        """Whether all its records have arrived."""
        if not self.over and self.reader.is_done(self.number):
            self.reader.collect(self)
        return self.over

    def wait(self) -> None:
        while not self.done:
            self.reader.pause()


class WorkerReader(RecordReader):
    """`RecordReader` with threads of compiled code. One of them reads ahead, the others on demand."""

    def __init__(self, pack: Pack, arena: Tensor, *, threads: int = THREADS) -> None:
        super().__init__(pack, arena, threads=threads)

    def _start(self, threads: int) -> None:
        rows = np.zeros((JOBS, 2 + 3 * ITEMS), np.int64)
        self._jobs = JobTable(rows, np.zeros(JOBS, np.int64), np.zeros(JOBS, np.int64))
        self._numbers, self._cancelled = list(range(JOBS)), list[int]()
        self._wakes = os.eventfd(0, os.EFD_CLOEXEC)
        self._pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]  # demand, ahead
        self._target = Destination.of(self.pack, self._bytes)
        served = [self._pipes[0][0]] * max(1, threads - 1) + [self._pipes[1][0]]
        self._threads = [
            threading.Thread(target=self._serve_pipe, args=(pipe,), daemon=True, name="moe-prism-read") for pipe in served
        ]
        for thread in self._threads:
            thread.start()

    def _serve_pipe(self, pipe: int) -> None:
        work(Descriptors(self._descriptor, pipe, self._wakes), self._jobs, self._target)

    def submit(self, items: Sequence[Item], *, ahead: bool = False) -> list[WorkerJob]:  # type: ignore[override]
        cut = shares(items, 1 if ahead else len(self._threads) - 1)
        return [self._begin(share[i : i + ITEMS], ahead) for share in cut for i in range(0, len(share), ITEMS)]

    def _begin(self, items: list[Item], ahead: bool) -> WorkerJob:
        met = [n for n in self._cancelled if self._jobs.tickets[n] > 1]
        if met:
            self._cancelled = [n for n in self._cancelled if n not in met]
            self._numbers += met
        number = self._numbers.pop()
        row, count = self._jobs.rows[number], len(items)
        row[COUNT], row[LOW] = count, items[0].low
        row[KEYS : KEYS + count] = [i.key for i in items]
        row[SLOTS : SLOTS + count] = [i.slot for i in items]
        self._jobs.tickets[number] = self._jobs.done[number] = 0
        os.write(self._pipes[ahead][1], number.to_bytes(8, "little"))
        return WorkerJob(items, ahead, self, number)

    def is_done(self, number: int) -> bool:
        return bool(self._jobs.done[number])

    def pause(self) -> None:
        """Until some job has ended since the last pause."""
        os.eventfd_read(self._wakes)

    def collect(self, job: WorkerJob) -> None:
        """Take the results of a job that has ended, and try again what failed."""
        found = self._jobs.rows[job.number, FOUND : FOUND + len(job.items)].tolist()
        self._numbers.append(job.number)
        job.over = True
        for item, state in zip(job.items, found, strict=True):
            if state != OK:
                self._again(job.failed, item, REASONS[state])
            elif item.low and not self._target.form.widens:
                self._widen(item)

    def cancel(self, job: WorkerJob) -> bool:  # type: ignore[override]
        # taking a ticket is atomic in compiled code and here, where nothing else runs Python
        if not take_ticket(self._jobs.tickets, job.number):
            return False
        job.over = True
        self._cancelled.append(job.number)  # its message is still in the pipe: not to be used again before a thread has met it
        return True

    def close(self) -> None:
        for pipe, count in ((self._pipes[0], len(self._threads) - 1), (self._pipes[1], 1)):
            for _ in range(count):
                os.write(pipe[1], (-1).to_bytes(8, "little", signed=True))
        for thread in self._threads:
            thread.join()
        for descriptor in (self._descriptor, self._wakes, *self._pipes[0], *self._pipes[1]):
            os.close(descriptor)


@njit(cache=True)
def take_ticket(tickets: Ints, number: int) -> bool:
    """Whether the job had no owner; it has one now."""
    return bool(take(tickets.ctypes.data + 8 * number) == 0)
