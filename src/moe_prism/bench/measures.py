"""The metrics, each defined here once; docs/reference/bench.md says them in words.

Everything is computed from raw events. A window is the part of a run that counts: requests by when they were due, tokens by when they came.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .outcome import OK, Outcome

EDGE = 0.1  # share of a run that is dropped at its beginning and at its end
STALL = 5.0  # times the median gap
LATE_SECONDS, LATE_SHARE = (
    5e-3,
    0.02,
)  # a run is void if the generator's p99 lateness passes the larger of 5 ms and 2 % of the mean gap
BEST = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Window:
    """Seconds since the run began."""

    start: float
    end: float

    @classmethod
    def steady(cls, seconds: float) -> Window:
        """A run without its edges."""
        return cls(EDGE * seconds, (1 - EDGE) * seconds)

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def due(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        return [o for o in outcomes if self.start <= o.job.arrival < self.end]


def measure(outcomes: Sequence[Outcome], window: Window) -> dict[str, Any]:
    """Figures of a run: over all requests of the window, and under `classes` over those of each class."""
    due = window.due(outcomes)
    kinds = sorted({o.job.kind for o in outcomes})
    classes = {k: _figures([o for o in due if o.job.kind == k], [o for o in outcomes if o.job.kind == k], window) for k in kinds}
    return {**_figures(due, outcomes, window), "classes": classes}


def _figures(due: Sequence[Outcome], everyone: Iterable[Outcome], window: Window) -> dict[str, Any]:
    met = sum(o.met for o in due)
    whole = [o for o in due if o.status == OK]
    computed = sum(o.computed for o in due if o.quality is not None)
    output, total = _tokens(everyone, window)
    gaps = [gap for o in due for gap in o.gaps]
    return {
        "offered": len(due),
        "met": met,
        "goodput": met / window.seconds,
        "attainment": met / len(due) if due else None,
        "outcomes": {status: sum(o.status == status for o in due) for status in sorted({o.status for o in due})},
        "output_tokens_per_second": output / window.seconds,
        "total_tokens_per_second": total / window.seconds,
        "quality": sum(o.quality * o.computed for o in due if o.quality is not None) / computed if computed else None,
        "ttft": percentiles([o.ttft for o in due]),
        "tpot": percentiles([o.tpot for o in due]),
        "itl": {**percentiles(gaps), "max": max(gaps, default=None), "stalls": stalls(gaps)},
        "e2e": percentiles([o.e2e for o in due]),
        "one_token_answers": sum(o.tokens == 1 for o in whole),
        "short_answers": sum(o.tokens < o.length for o in whole),
    }


def percentiles(values: Iterable[float | None]) -> dict[str, Any]:
    """p50, p90 and p99 of raw values, interpolated linearly. `enough` says whether there are the 1,000 that a p99 needs."""
    known = np.array([v for v in values if v is not None])
    if not len(known):
        return {"n": 0, "mean": None, **{f"p{round(100 * q)}": None for q in BEST}, "enough": False}
    found = np.quantile(known, BEST)
    named = {f"p{round(100 * q)}": float(v) for q, v in zip(BEST, found, strict=True)}
    return {"n": len(known), "mean": float(known.mean()), **named, "enough": len(known) >= 1000}


def stalls(gaps: Sequence[float]) -> int:
    """Gaps of more than five times the median one."""
    return int(np.sum(np.array(gaps) > STALL * np.median(gaps))) if gaps else 0


def _tokens(outcomes: Iterable[Outcome], window: Window) -> tuple[float, float]:
    """(output, total) tokens that came within the window. A request's tokens are shared evenly over its events, its prompt comes with
    the first.
    """
    output = prompt = 0.0
    for o in outcomes:
        if o.events and o.tokens:
            inside = sum(window.start <= t < window.end for t in o.events)
            output += o.tokens * inside / len(o.events)
            prompt += o.prompt * (window.start <= o.events[0] < window.end)
    return output, output + prompt


@dataclass(frozen=True)
class Lateness:
    """How far behind its schedule the generator was, in seconds."""

    p50: float
    p99: float
    most: float
    bound: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], seconds: float) -> Lateness:
        """Over all requests that were sent in a run of so many seconds."""
        late = [o.late for o in outcomes if o.sent is not None] or [0.0]
        p50, p99 = np.quantile(late, [0.5, 0.99])
        return cls(float(p50), float(p99), max(late), max(LATE_SECONDS, LATE_SHARE * seconds / max(len(outcomes), 1)))

    @property
    def void(self) -> bool:
        return self.p99 > self.bound
