"""One run as data: its measures, and what makes it valid or void."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import replace_file
from ..result import Result, plain
from ..schedule.base import Ladder
from .load import LoadRun
from .measures import measure
from .outcome import FAILED, Outcome

VERSION = 1
REPEATED = 3  # kinds of failure that are reported with their message


@dataclass(frozen=True)
class Benchmark(Result):
    """What was offered and measured, as JSON, and the runs with every request by name."""

    result: dict[str, Any]
    runs: list[tuple[str, LoadRun]]

    def to_json(self) -> dict[str, Any]:
        return self.result

    def to_records(self) -> list[dict[str, Any]]:
        """A row per run: of a server per rate, of policies per rate, policy and repeat."""
        if "runs" in self.result:
            return plain(self.result["runs"])
        return [
            {"policy": label, "repeat": i, **row}
            for rate in self.result["rates"]
            for label, made in rate["policies"].items()
            for i, row in enumerate(plain(made["real"]))
        ]


def run_result(run: LoadRun, ladder: Ladder) -> dict[str, Any]:
    """JSON of a run. `void` names what makes its figures worthless; `warnings` what a reader must know."""
    lateness = run.lateness
    figures = measure(run.outcomes, run.window)
    void = (
        [f"the generator was late: p99 {1e3 * lateness.p99:.1f} ms, bound {1e3 * lateness.bound:.1f} ms"] if lateness.void else []
    )
    warnings = []
    saturated = run.saturated
    if saturated:
        warnings.append("saturated: queues grew during the whole run, so latencies depend on its length")
    if run.client_cpu > 0.5:
        warnings.append(f"the generator used {100 * run.client_cpu:.0f} % of a core")
    if figures["short_answers"]:
        warnings.append(f"{figures['short_answers']} answers were shorter than asked for")
    below = sum(below_floor(o, ladder) for o in run.outcomes)
    if below:
        warnings.append(f"{below} requests were served below their floor")
    return {
        **figures,
        "requests": len(run.outcomes),
        "seconds": run.seconds,
        "lateness": asdict(lateness),
        "client_cpu": round(run.client_cpu, 4),
        "saturated": saturated,
        "below_floor": below,
        "failures": failures(run.outcomes),
        "void": void,
        "warnings": warnings,
    }


def below_floor(outcome: Outcome, ladder: Ladder) -> bool:
    """Was its mean quality less than its floor's?"""
    return outcome.quality is not None and outcome.quality < ladder.levels[outcome.job.floor].quality - 1e-5


def failures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """The most frequent messages of requests that failed."""
    counts: dict[str, int] = {}
    for o in outcomes:
        if o.status == FAILED:
            counts[o.detail] = counts.get(o.detail, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:REPEATED])


def save(path: Path, result: dict[str, Any]) -> None:
    """Write JSON; a reader meets the old file or the new one."""
    replace_file(path, (json.dumps({"version": VERSION, **result}, indent=1) + "\n").encode())
