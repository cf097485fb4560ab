"""Running requests as columns: what never changes is read once per request, not once per step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Job, Ladder, Progress, Work
from .fill import ceiling

# Columns. TPOT: infinite without a target or when the first token was too late for it to matter. FIRST: when the first token came.
# LAST: when it last took part in a step. DONE: tokens generated.
TPOT, PROMPT, OUTPUT, FIRST, LAST, DONE = range(6)
LEARNING_RATE = 0.05  # of the share of their allowance that requests use
Floats = NDArray[np.float64]


class Running:
    """A row per running request, found again by its id. Rows of requests that are gone are used again."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._decode: list[list[Work]] = []  # row -> a decode's Work at every level: it is the same object at every step
        self.table: Floats = np.zeros((64, 6))
        self.levels: NDArray[np.int64] = np.zeros((64, 2), dtype=np.int64)  # floor, ceiling
        self.used = 1.0  # mean share of `output` that finished requests generated

    def sync(self, running: Sequence[Progress], now: float) -> NDArray[np.int64]:
        """The row of each running request."""
        known = self._rows
        try:
            rows = [known[p.job.id] for p in running]
        except KeyError:
            for p in running:
                if p.job.id not in known:
                    self._add(p.job, now)
            rows = [known[p.job.id] for p in running]
        if len(known) != len(rows):
            for name in known.keys() - {p.job.id for p in running}:
                self._remove(name)
        found = np.array(rows, dtype=np.int64)
        generated = np.array([p.generated for p in running], dtype=np.float64)
        self.table[found, DONE] = generated
        for i in np.flatnonzero(np.isnan(self.table[found, FIRST]) & (generated > 0)).tolist():
            self._first(rows[i], running[i], now)
        return found

    def _first(self, row: int, progress: Progress, now: float) -> None:
        """The first token came; a request for which it was too late has nothing more to meet."""
        first = now if progress.first_token is None else progress.first_token
        self.table[row, FIRST] = first
        if progress.job.ttft is not None and first > progress.job.arrival + progress.job.ttft:
            self.table[row, TPOT] = np.inf

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
        tpot = np.inf if job.tpot is None else job.tpot
        self.table[row] = (tpot, job.prompt, job.output, np.nan, now, 0)
        self.levels[row] = (job.floor, ceiling(job, self._ladder))
        self._rows[job.id] = row

    def _remove(self, name: str) -> None:
        row = self._rows.pop(name)
        self._free.append(row)
        share = min((self.table[row, DONE] + 1) / max(self.table[row, OUTPUT], 1), 1.0)
        self.used += LEARNING_RATE * (share - self.used)

    def silent(self, rows: NDArray[np.int64]) -> list[int]:
        """Which of these have generated nothing yet."""
        silent: list[int] = np.flatnonzero(self.table[rows, DONE] == 0).tolist()
        return silent

    def remaining(self, rows: NDArray[np.int64]) -> Floats:
        """Tokens that each of these is expected still to generate, at least 1."""
        left: Floats = np.maximum(self.table[rows, OUTPUT] * self.used - self.table[rows, DONE], 1.0)
        return left

    def decode_work(self, rows: NDArray[np.int64], levels: NDArray[np.int64]) -> list[Work]:
        works = self._decode
        return [works[r][level] for r, level in zip(rows.tolist(), levels.tolist(), strict=True)]
