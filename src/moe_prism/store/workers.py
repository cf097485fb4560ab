"""RecordReader threads that never run Python once they have begun: jobs come through a pipe, results through memory.

A thread that needs the interpreter's lock to say that it is done makes the thread that computes wait for it, which costs more than a small
read (docs/store.md has the figures). What fails is tried again by the thread that asked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit, types
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.tiles import take
from .native import OK, REASONS, Ints, Words, read_records, widen_bfloat16
from .pack import Pack
from .reader import RUN, THREADS, Item, RecordReader, shares

JOBS = 2048  # under way at most
ITEMS = 64  # of a job at most
COUNT, LOW, KEYS, SLOTS, FOUND = 0, 1, 2, 2 + ITEMS, 2 + 2 * ITEMS
"""Columns of the job table: how many records, which form, their keys and slots, and what became of them."""

_read = types.ExternalFunction("read", types.intp(types.intc, types.intp, types.intp))
_write = types.ExternalFunction("write", types.intp(types.intc, types.intp, types.intp))


@njit(nogil=True, cache=True)
def work(
    files: Ints, table: Ints, tickets: Ints, done: Ints, words: Words, arena: NDArray[np.uint8], sums: Words, form: Ints
) -> None:
    """Serve jobs until a negative number comes.

    files: descriptors of the packed file, of the pipe of job numbers, of the counter of finished jobs. tickets: who takes one first owns
    the job. form: start of the records, of the int8 records, bytes of either, number of records, rows, hidden, whether to widen here.
    """
    message, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    while True:
        if _read(types.intc(files[1]), message.ctypes.data, 8) != 8 or message[0] < 0:
            return
        job = message[0]
        if take(tickets.ctypes.data + 8 * job) != 0:
            continue
        count, low = table[job, COUNT], table[job, LOW]
        keys, slots = table[job, KEYS : KEYS + count], table[job, SLOTS : SLOTS + count]
        size, base = form[2 + low], form[low]
        own = np.empty(count, np.uint64)
        for i in range(count):
            own[i] = sums[keys[i] + low * form[4]]
        skip = (form[2] - size) // 8
        found = read_records(types.intc(files[0]), words, slots.copy(), base + keys * size, skip, RUN, own)
        for i in range(count):
            if low == 1 and form[7] == 1 and found[i] == OK:
                widen_bfloat16(arena[slots[i]], form[5], form[6], form[2] - form[3])
            table[job, FOUND + i] = found[i]
        done[job] = 1
        _write(types.intc(files[2]), one.ctypes.data, 8)


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
        layout = self.pack.layout
        self._table = np.zeros((JOBS, 2 + 3 * ITEMS), np.int64)
        self._tickets, self._done = np.zeros(JOBS, np.int64), np.zeros(JOBS, np.int64)
        self._numbers, self._cancelled = list(range(JOBS)), list[int]()
        self._wakes = os.eventfd(0, os.EFD_CLOEXEC)
        self._pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]  # demand, ahead
        self._widens = layout.dtype == "bfloat16" and not layout.has_bias
        form = [self.pack.start, self.pack.low_start, layout.bytes, layout.low_bytes, len(self.pack.space)]
        self._form = np.array([*form, layout.rows, layout.hidden, self._widens], np.int64)
        self._sums = np.array(self.pack.sums)  # writable, as the others: one compiled version
        served = [self._pipes[0][0]] * max(1, threads - 1) + [self._pipes[1][0]]
        self._threads = [
            threading.Thread(target=self._serve_pipe, args=(pipe,), daemon=True, name="moe-prism-read") for pipe in served
        ]
        for thread in self._threads:
            thread.start()

    def _serve_pipe(self, pipe: int) -> None:
        files = np.array([self._descriptor, pipe, self._wakes], np.int64)
        work(files, self._table, self._tickets, self._done, self._words, self._bytes, self._sums, self._form)

    def submit(self, items: Sequence[Item], *, ahead: bool = False) -> list[WorkerJob]:  # type: ignore[override]
        cut = shares(items, 1 if ahead else len(self._threads) - 1)
        return [self._begin(share[i : i + ITEMS], ahead) for share in cut for i in range(0, len(share), ITEMS)]

    def _begin(self, items: list[Item], ahead: bool) -> WorkerJob:
        met = [n for n in self._cancelled if self._tickets[n] > 1]
        if met:
            self._cancelled = [n for n in self._cancelled if n not in met]
            self._numbers += met
        number = self._numbers.pop()
        row, count = self._table[number], len(items)
        row[COUNT], row[LOW] = count, items[0].low
        row[KEYS : KEYS + count] = [i.key for i in items]
        row[SLOTS : SLOTS + count] = [i.slot for i in items]
        self._tickets[number] = self._done[number] = 0
        os.write(self._pipes[ahead][1], number.to_bytes(8, "little"))
        return WorkerJob(items, ahead, self, number)

    def is_done(self, number: int) -> bool:
        return bool(self._done[number])

    def pause(self) -> None:
        """Until some job has ended since the last pause."""
        os.eventfd_read(self._wakes)

    def collect(self, job: WorkerJob) -> None:
        """Take the results of a job that has ended, and try again what failed."""
        found = self._table[job.number, FOUND : FOUND + len(job.items)].tolist()
        self._numbers.append(job.number)
        job.over = True
        for item, state in zip(job.items, found, strict=True):
            if state != OK:
                self._again(job.failed, item, REASONS[state])
            elif item.low and not self._widens:
                self._widen(item)

    def cancel(self, job: WorkerJob) -> bool:  # type: ignore[override]
        # taking a ticket is atomic in compiled code and here, where nothing else runs Python
        if not take_ticket(self._tickets, job.number):
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
