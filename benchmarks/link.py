"""A link of a bandwidth in front of a store's reader."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass
class LinkJob:
    """A job that has ended when the link has carried it, too."""

    job: Any
    until: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.job, name)

    @property
    def done(self) -> bool:
        return self.job.done and time.perf_counter() >= self.until

    def wait(self) -> None:
        self.job.wait()
        time.sleep(max(0.0, self.until - time.perf_counter()))


class Link:
    """The store's own reader behind a link of a bandwidth: what is asked for is carried one after the other."""

    def __init__(self, reader: Any, megabytes: float) -> None:
        self.reader, self.rate, self.free = reader, megabytes * 1e6, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def read(self, keys: Any, slots: Any, *, low: bool = False, ahead: bool = False) -> list[LinkJob]:
        layout = self.reader.pack.layout
        found = []
        self.free = max(self.free, time.perf_counter())
        for job in self.reader.read(keys, slots, low=low, ahead=ahead):
            self.free += job.count * (layout.low_bytes if low else layout.bytes) / self.rate
            found.append(LinkJob(job, self.free))
        return found

    def cancel(self, job: LinkJob) -> bool:
        return self.reader.cancel(job.job)
