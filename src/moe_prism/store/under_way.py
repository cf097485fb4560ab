"""Reads that were begun ahead of their use and that nobody has looked at since."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import numpy as np

from ..offload.base import ExpertCache, Key
from .reader import ReadJob, RecordReader


class UnderWay:
    """Prefetched keys and the jobs that bring them.

    The cache counts them as resident from the beginning. Each is pinned until it has landed: a slot that a read is still going to write
    to must not be given to another record.
    """

    def __init__(self, cache: ExpertCache, reader: RecordReader, keys: int, lose: Callable[[Key], None]) -> None:
        """keys: how many there are; lose: told of keys that will not come."""
        self.pending = np.zeros(keys, bool)  # [keys] which are under way
        self._cache, self._reader, self._lose = cache, reader, lose
        self._jobs: dict[Key, ReadJob] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, keys: Sequence[Key], jobs: Sequence[ReadJob]) -> None:
        """Keys that jobs have begun to read."""
        self._cache.pin(keys)
        for job in jobs:
            self._jobs.update((item.key, job) for item in job.items)
        self.pending[list(keys)] = True

    def bringing(self, keys: Sequence[Key]) -> list[ReadJob]:
        """The jobs that bring some of these keys, each once."""
        return list({id(job): job for key in keys if (job := self._jobs.get(key))}.values())

    def land(self, key: Key) -> None:
        """The key is not under way any more, if it was."""
        if self._jobs.pop(key, None) is not None:
            self.pending[key] = False
            self._cache.unpin([key])

    def note_arrivals(self) -> None:
        """Take note of what has arrived or failed."""
        if not self._jobs:
            return
        self._reader.poll()
        for key, job in list(self._jobs.items()):
            if job.done:
                self.land(key)
                if key in job.failed:
                    self._lose(key)

    def wait(self) -> None:
        """Until nothing is under way."""
        for job in list(self._jobs.values()):
            job.wait()
        self.note_arrivals()

    def take_back(self, keys: range, needed: Container[Key]) -> None:
        """Of the prefetches of these keys, cancel those that nobody needs and no thread has begun."""
        jobs = {id(job): job for key, job in self._jobs.items() if key in keys}
        for job in jobs.values():
            if not any(item.key in needed for item in job.items) and self._reader.cancel(job):
                for item in job.items:
                    self.land(item.key)
                    self._lose(item.key)
