"""Running requests as columns: what never changes is read once per request, not once per step."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from .base import Job, Ladder, Progress, Work
from .fill import ceiling

# Columns. TPOT: target in seconds per token; 0, with START and END infinite, if there is none or the first token came too late for one to
# matter. START: when token 0 would have come on schedule, counting from 0. END: when the last one is due. LAST: when it last took part
# in a step. DONE: tokens generated.
TPOT, PROMPT, OUTPUT, START, END, LAST, DONE = range(7)
ID, GENERATED = attrgetter("job.id"), attrgetter("generated")
LEARNING_RATE = 0.05  # of the share of their allowance that requests use
Floats = NDArray[np.float64]


class Running:
    """A row per running request, found again by its id. Rows of requests that are gone are used again."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._decode: list[list[Work]] = []  # row -> a decode's Work at every level: it is the same object at every step
        self.table: Floats = np.zeros((64, 7))
        self.levels: NDArray[np.int64] = np.zeros((64, 2), dtype=np.int64)  # floor, ceiling
        self._silent: set[int] = set()  # rows that have generated nothing yet
        self.silent: list[int] = []  # their places in the `running` of the last `sync`
        self.used = 1.0  # mean share of `output` that finished requests generated

    def sync(self, running: Sequence[Progress], now: float) -> NDArray[np.int64]:
        """The row of each running request."""
        known = self._rows
        try:
            rows = list(map(known.__getitem__, map(ID, running)))
        except KeyError:
            for p in running:
                if p.job.id not in known:
                    self._add(p.job, now)
            rows = list(map(known.__getitem__, map(ID, running)))
        if len(known) != len(rows):
            for row in set(known.values()).difference(rows):
                self._remove(row)
        found = np.array(rows, dtype=np.int64)
        generated = np.fromiter(map(GENERATED, running), np.float64, len(running))
        self.table[found, DONE] = generated
        self.silent = np.flatnonzero(generated == 0).tolist()
        silent = {rows[i] for i in self.silent}
        for row in self._silent - silent:
            if row in rows:
                self._first(row, running[rows.index(row)], now)
        self._silent = silent
        return found

    def _first(self, row: int, progress: Progress, now: float) -> None:
        """The first token came; a request for which it was too late has nothing more to meet."""
        first, job = now if progress.first_token is None else progress.first_token, progress.job
        if job.tpot is not None and (job.ttft is None or first <= job.arrival + job.ttft):
            self.table[row, TPOT : END + 1] = (
                job.tpot,
                job.prompt,
                job.output,
                first - job.tpot,
                first + job.tpot * (job.output - 1),
            )

    def _add(self, job: Job, now: float) -> None:
        row = self._free.pop() if self._free else len(self._decode)
        works = [Work(job.id, 1, level) for level in range(len(self._ladder))]
        if row == len(self._decode):
            self._decode.append(works)
        else:
            self._decode[row] = works
        if row == len(self.table):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
            self.levels = np.concatenate([self.levels, np.zeros_like(self.levels)])
        self.table[row] = (0.0, job.prompt, job.output, np.inf, np.inf, now, 0.0)
        self._silent.add(row)
        self.levels[row] = (job.floor, ceiling(job, self._ladder))
        self._rows[job.id] = row

    def _remove(self, row: int) -> None:
        del self._rows[self._decode[row][0].id]
        self._free.append(row)
        share = min((self.table[row, DONE] + 1) / max(self.table[row, OUTPUT], 1), 1.0)
        self.used += LEARNING_RATE * (share - self.used)

    def remaining(self, rows: NDArray[np.int64]) -> Floats:
        """Tokens that each of these is expected still to generate, at least 1."""
        left: Floats = np.maximum(self.table[rows, OUTPUT] * self.used - self.table[rows, DONE], 1.0)
        return left

    def decode_work(self, rows: NDArray[np.int64], levels: NDArray[np.int64]) -> list[Work]:
        works = self._decode
        return [works[r][level] for r, level in zip(rows.tolist(), levels.tolist(), strict=True)]
