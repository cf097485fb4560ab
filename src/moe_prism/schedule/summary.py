"""Figures of a replay (definitions: goodput = requests per second that met all their targets; attainment = met / offered)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .simulate import Served, SimulatedRun


@dataclass(frozen=True)
class Summary:
    """Over requests that arrived in a window. Times are seconds; nan where nothing was measured."""

    offered: int
    met: int
    finished: int
    goodput: float  # requests/s that met all targets
    attainment: float  # met / offered; refused and unfinished ones count as missed
    throughput: float  # output tokens/s of finished requests
    quality: float  # mean quality over served tokens, prompt and output
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float


def window(run: SimulatedRun, start: float, end: float) -> list[Served]:
    """Requests that arrived in [start, end)."""
    return [r for r in run.results if start <= r.job.arrival < end]


def summarise(results: Sequence[Served], seconds: float) -> Summary:
    """Figures of these requests, offered within `seconds`."""
    met = sum(r.met for r in results)
    tokens = sum(r.tokens for r in results)
    ttft = _quantiles(r.ttft for r in results)
    tpot = _quantiles(r.tpot for r in results)
    return Summary(
        offered=len(results),
        met=met,
        finished=sum(r.end is not None for r in results),
        goodput=met / seconds,
        attainment=met / max(len(results), 1),
        throughput=sum(r.length for r in results if r.end is not None) / seconds,
        quality=sum(r.quality_sum for r in results) / tokens if tokens else float("nan"),
        ttft_p50=ttft[0],
        ttft_p99=ttft[1],
        tpot_p50=tpot[0],
        tpot_p99=tpot[1],
    )


def by_class(results: Sequence[Served]) -> dict[str, list[Served]]:
    """Results by class name, names in order."""
    kinds = sorted({r.job.kind for r in results})
    return {kind: [r for r in results if r.job.kind == kind] for kind in kinds}


def _quantiles(values: Iterable[float | None]) -> tuple[float, float]:
    known = [v for v in values if v is not None]
    if not known:
        return float("nan"), float("nan")
    p50, p99 = np.quantile(known, [0.5, 0.99])
    return float(p50), float(p99)
