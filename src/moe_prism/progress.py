"""How long work reports itself, without knowing who listens."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Update = Callable[[int, int], None]
Report = Callable[[str], AbstractContextManager[Update]]
"""report("stage") opens a stage and yields update(done, total)."""


@contextmanager
def silent(_title: str) -> Iterator[Update]:
    """For work that nobody listens to."""
    yield lambda _done, _total: None


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
