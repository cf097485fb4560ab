"""How long work reports itself, without knowing who listens."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

Update = Callable[[int, int], None]
Report = Callable[[str], AbstractContextManager[Update]]
"""report("stage") opens a stage and yields update(done, total)."""


@contextmanager
def silent(_title: str) -> Iterator[Update]:
    """For work that nobody listens to."""
    yield lambda _done, _total: None


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux hands what `getrusage` says on to a program that a process starts: it may be that of whoever started this one.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
