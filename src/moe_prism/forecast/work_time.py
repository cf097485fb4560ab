"""How long work takes, from pieces of it that were timed on this machine; what was timed is kept per machine.

A piece is one batch of a job on the job's own model, with one decoder layer there: what it spends inside that layer counts once per layer,
what it spends outside of it once. So nothing has to be known of families, kernels or processors.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import PrismError
from ..files import replace_file
from ..schema import read_form
from ..schema.cost import TimesForm

DISTURBED = 0.9  # of the time on the clock: with less processor time than that, others had the machine, and a figure is not kept
FILE = "work-times.json"


@dataclass(frozen=True)
class Seconds:
    """Time on the clock, and of processors."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        """What is left, never less than nothing."""
        return Seconds(max(0.0, self.wall - other.wall), max(0.0, self.cpu - other.cpu))

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.wall * times, self.cpu * times)

    @classmethod
    def now(cls) -> Seconds:
        """Of this process; differences count."""
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def sum(cls, parts: Iterable[Seconds]) -> Seconds:
        found = list(parts)
        return cls(sum(part.wall for part in found), sum(part.cpu for part in found))


class Split(NamedTuple):
    """What a piece of work spent in the one decoder layer, and outside of it."""

    inside: Seconds
    outside: Seconds

    def of(self, layers: int) -> Seconds:
        """The same work with so many layers."""
        return self.inside * layers + self.outside


def timed(work: Callable[[], object]) -> Seconds:
    """What it takes."""
    begin = Seconds.now()
    work()
    return Seconds.now() - begin


def remembered(name: str, measure: Callable[[], Mapping[str, Seconds]]) -> dict[str, Seconds]:
    """What was measured under this name on this machine, measured now where it was not yet.

    name: says all that a time depends on. What is measured while others have the machine is used and not kept.
    """
    prefix, known = f"{name} | ", _kept()
    found = {key.removeprefix(prefix): Seconds(*values) for key, values in known.items() if key.startswith(prefix)}
    if found:
        return found
    found = dict(measure())
    total = Seconds.sum(found.values())
    if total.cpu >= DISTURBED * total.wall:
        _keep({f"{prefix}{key}": [value.wall, value.cpu] for key, value in found.items()})
    return found


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-prism" / FILE


def _kept() -> dict[str, list[float]]:
    """What this machine knows; nothing where the file is missing or is not ours."""
    try:
        return {
            name: list(values)
            for name, values in read_form(TimesForm, _file()).root.items()
            if len(values) == len(("wall", "cpu"))
        }
    except PrismError:
        return {}


def _keep(found: Mapping[str, list[float]]) -> None:
    """Write measurements down; where nothing can be written they hold for this process."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        replace_file(_file(), json.dumps({**_kept(), **found}, indent=0).encode())
    except OSError:
        return
