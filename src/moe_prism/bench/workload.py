"""Which requests are offered: a named workload or a trace, the same ones for a server and for the simulator."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..registry import choices
from ..schedule.base import Ladder
from ..schedule.classes import RequestClass
from ..schedule.workloads import TIMES, Arrival, Recorded, generate, read_trace
from .prompts import fitted


@dataclass(frozen=True)
class Offer:
    """What a user asks for. name: one of `moe_prism.schedule.workloads`; trace: replayed instead. seconds: None for 60, or all of a trace
    as recorded. spread: of floors drawn per request, 0 keeps the classes'. slower: factor on the classes' times."""

    name: str = "classes"
    seconds: float | None = None
    trace: Path | None = None
    spread: float = 0.0
    slower: float = 1.0

    def __post_init__(self) -> None:
        """UsageError for what cannot be offered."""
        if self.trace is not None:
            if not self.trace.is_file():
                raise UsageError(f"no trace at {self.trace}", "give a file of JSON lines, see docs/scheduling.md")
        elif self.name not in TIMES:
            raise UsageError(f"unknown workload '{self.name}'", f"{choices(self.name, TIMES)}; or give --trace")
        if self.seconds is not None and not 1 <= self.seconds <= 86_400:
            raise UsageError(f"--seconds {self.seconds:g} is out of range", "give 1 to 86400")
        if not (0 <= self.spread <= 1 and 1e-3 <= self.slower <= 1e3):
            raise UsageError(
                f"--spread {self.spread:g} or --slower {self.slower:g} is out of range", "give 0 to 1, and 0.001 to 1000"
            )

    @cached_property
    def recorded(self) -> Sequence[Recorded]:
        """The trace, read once; empty without one."""
        return read_trace(self.trace) if self.trace else ()

    @cached_property
    def length(self) -> float:
        """Seconds of it, at least 1."""
        if self.seconds is not None or not self.recorded:
            return self.seconds or 60.0
        span = round(self.recorded[-1].arrival - self.recorded[0].arrival, 6)  # as `Workload.arrivals` rounds
        return min(max(math.nextafter(span, math.inf), 1.0), 86_400.0)

    def of(self, classes: Mapping[str, RequestClass]) -> Workload:
        """With these classes."""
        return Workload(self, {name: kind.slower(self.slower) for name, kind in classes.items()})


@dataclass(frozen=True)
class Workload:
    """An offer, and the classes its requests are of."""

    offer: Offer
    classes: Mapping[str, RequestClass]

    @property
    def seconds(self) -> float:
        return self.offer.length

    @property
    def name(self) -> str:
        return "trace" if self.offer.trace else self.offer.name

    def described(self) -> dict[str, Any]:
        """As JSON."""
        trace = self.offer.trace and str(self.offer.trace)
        classes = {name: asdict(kind) for name, kind in self.classes.items()}
        return {**asdict(self.offer), "name": self.name, "seconds": self.seconds, "trace": trace, "classes": classes}

    def arrivals(self, rate: float, seed: int, ladder: Ladder, context: int | None) -> list[Arrival]:
        """In order of arrival. A trace is stretched to the rate (0: as recorded) and cut to the seconds."""
        offer = self.offer
        if offer.trace is None:
            made = generate(offer.name, rate, self.seconds, self.classes, ladder, seed, spread=offer.spread)
        else:
            made = self._replayed([line.of(self.classes, ladder) for line in offer.recorded], rate)
        if len(made) < 2:
            raise UsageError(f"{len(made)} requests in {self.seconds:g} s", "raise the rate or the seconds")
        return fitted(made, context)

    def _replayed(self, arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
        first, span = arrivals[0].job.arrival, arrivals[-1].job.arrival - arrivals[0].job.arrival
        scale = len(arrivals) / (rate * span) if rate and span else 1.0
        moved = [Arrival(replace(a.job, arrival=round((a.job.arrival - first) * scale, 6)), a.length) for a in arrivals]
        return [a for a in moved if a.job.arrival < self.seconds]


def fingerprint(arrivals: Sequence[Arrival]) -> str:
    """SHA-256 of a schedule: same seed, same bytes."""
    rows = [[a.job.arrival, a.job.kind, a.job.prompt, a.job.output, a.length, a.job.floor, a.job.ceiling] for a in arrivals]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
