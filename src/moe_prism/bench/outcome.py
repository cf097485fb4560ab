"""What became of one request, measured by a client or told by the simulator."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replace_file
from ..schedule.base import Job
from ..schedule.simulate import Served

OK = "ok"
REFUSED = "refused"  # 429 or 503
FAILED = "failed"  # another error, at the start or in the stream
UNFINISHED = "unfinished"  # cut off when the run ended


@dataclass
class Outcome:
    """Times are seconds since the run began. Only `status` OK counts as an answer; everything else is a bad request, not a missing one."""

    job: Job  # `arrival` is when the request was due
    length: int  # tokens it was to generate
    sent: float | None = None  # handed to the socket
    events: list[float] = field(default_factory=list)  # every event that carried text
    end: float | None = None
    tokens: int = 0  # generated, as the server counted them
    prompt: int = 0  # likewise
    status: str = UNFINISHED
    detail: str = ""
    quality: float | None = None  # mean over the tokens computed, if the server says
    computed: int = 0  # those tokens, prompt and output

    @property
    def late(self) -> float:
        """Seconds after it was due."""
        return 0.0 if self.sent is None else self.sent - self.job.arrival

    @property
    def ttft(self) -> float | None:
        return self.events[0] - self.sent if self.events and self.sent is not None else None

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for an answer of one token, or none that is whole."""
        if self.status != OK or self.tokens < 2 or not self.events:
            return None
        return (self.events[-1] - self.events[0]) / (self.tokens - 1)

    @property
    def e2e(self) -> float | None:
        return self.events[-1] - self.sent if self.status == OK and self.events and self.sent is not None else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between events, ITL."""
        return np.diff(self.events).tolist() if len(self.events) > 1 else []

    @property
    def met(self) -> bool:
        """Whole, and within every target of its class."""
        if self.status != OK or self.ttft is None:
            return False
        in_time = self.job.ttft is None or self.ttft <= self.job.ttft + 1e-9
        return in_time and (self.job.tpot is None or self.tpot is None or self.tpot <= self.job.tpot + 1e-9)

    def to_json(self) -> dict[str, Any]:
        """One line of an events file."""
        job = self.job
        return {
            "id": job.id,
            "class": job.kind,
            "due": job.arrival,
            "sent": _round(self.sent),
            "events": [_round(t) for t in self.events],
            "end": _round(self.end),
            "prompt": self.prompt,
            "tokens": self.tokens,
            "asked": self.length,
            "ttft_target": job.ttft,
            "tpot_target": job.tpot,
            "status": self.status,
            "detail": self.detail,
            "quality": self.quality,
            "computed": self.computed,
            "met": self.met,
        }


def of_simulation(results: Iterable[Served], end: float) -> list[Outcome]:
    """The simulator's results in the client's terms. Token times between the first and the last are spread evenly."""
    return [_simulated(result, end) for result in results]


def _simulated(result: Served, run_end: float) -> Outcome:
    job = result.job
    outcome = Outcome(
        job, result.length, job.arrival, end=result.end, prompt=job.prompt, computed=result.tokens, quality=result.quality
    )
    if result.refused:
        outcome.status = REFUSED
        return outcome
    if result.end is not None:
        outcome.status, outcome.tokens = OK, result.length
    elif result.first is not None:
        outcome.tokens = max(1, result.tokens - job.prompt + 1)
    if result.first is not None:
        last = result.end if result.end is not None else run_end
        outcome.events = np.linspace(result.first, last, outcome.tokens).tolist()
    return outcome


def write_events(path: Path, runs: Iterable[tuple[str, Iterable[Outcome]]]) -> None:
    """JSON lines, one request each, with the name of its run."""
    lines = [json.dumps({"run": name, **o.to_json()}) + "\n" for name, outcomes in runs for o in outcomes]
    replace_file(path, "".join(lines).encode())


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
