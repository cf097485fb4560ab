"""Which requests are offered: a named workload or a trace, the same ones for a server and for the simulator."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import UsageError
from ..options.bench import Offer
from ..registry import choices
from ..schedule.base import Ladder
from ..schedule.classes import RequestClass
from ..schedule.workloads import TIMES, Arrival, Recorded, generate, read_trace
from .prompts import fitted


@dataclass(frozen=True)
class Workload:
    """An offer, and the classes its requests are of."""

    offer: Offer
    classes: Mapping[str, RequestClass]

    @classmethod
    def of(cls, offer: Offer, classes: Mapping[str, RequestClass]) -> Workload:
        """With these classes, as much slower as the offer says. UsageError for what cannot be offered."""
        offer.check()
        if offer.trace is None and offer.name not in TIMES:
            raise UsageError(f"unknown workload '{offer.name}'", f"{choices(offer.name, TIMES)}; or give --trace")
        return cls(offer, {name: kind.slower(offer.slower) for name, kind in classes.items()})

    @cached_property
    def recorded(self) -> Sequence[Recorded]:
        """The trace, read once; empty without one."""
        return read_trace(self.offer.trace) if self.offer.trace else ()

    @cached_property
    def seconds(self) -> float:
        """Length of the offer, at least 1."""
        if self.offer.seconds is not None or not self.recorded:
            return self.offer.seconds or 60.0
        span = round(self.recorded[-1].arrival - self.recorded[0].arrival, 6)  # as `arrivals` rounds
        return min(max(math.nextafter(span, math.inf), 1.0), 86_400.0)

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
            made = self._replayed([line.of(self.classes, ladder) for line in self.recorded], rate)
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
