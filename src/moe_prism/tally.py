"""What a reading of text took in, and what it left out, counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TextTally:
    """One reading of one source. left_out: what was not read, by reason; remarks: what was read with a doubt; examples: a place of each."""

    source: str
    documents: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, reason: str, where: str, count: int = 1) -> None:
        """Count something that is not read."""
        self.left_out[reason] += count
        self.examples.setdefault(reason, where)

    def remark(self, what: str, where: str, count: int = 1) -> None:
        """Count something that is read, and of which people should know."""
        self.remarks[what] += count
        self.examples.setdefault(what, where)

    def to_json(self) -> dict[str, Any]:
        """Plain values: source, documents, left_out, remarks."""
        counts = {"left_out": dict(sorted(self.left_out.items())), "remarks": dict(sorted(self.remarks.items()))}
        return {"source": self.source, "documents": self.documents, **{k: v for k, v in counts.items() if v}}

    def line(self) -> str:
        """One line for people; empty where everything was read without a doubt."""
        parts = [f"{label}{self._list(counts)}" for label, counts in (("left out ", self.left_out), ("", self.remarks)) if counts]
        return f"text {self.source}: {self.documents} documents; {'; '.join(parts)}" if parts else ""

    def _list(self, counts: Counter[str]) -> str:
        return ", ".join(f"{what} {n} (first: {self.examples[what]})" for what, n in sorted(counts.items()))


_watcher: ContextVar[Callable[[TextTally], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def watch_reading(see: Callable[[TextTally], None]) -> Iterator[None]:
    """Inside, `see` is called with the tally of every source that was read to its end."""
    token = _watcher.set(see)
    try:
        yield
    finally:
        _watcher.reset(token)


def report_reading(tally: TextTally) -> None:
    """Tell whoever watches."""
    see = _watcher.get()
    if see is not None:
        see(tally)
