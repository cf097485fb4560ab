"""Points at which a model can run, and what a step costs at each of them: a forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..result import Result
from .distinct import Routing, distinct, kept_experts
from .step_time import Fit, Machine, Read, Reads, Shape, StepLoad, terms

PAYS = 1.05
"""Ratio to full from which a point is called worth its loss of quality: below, two runs of one setting differ as much."""
MOST_SKIPS = 8  # columns of the table
STOCK, ELASTIC = "stock", "elastic"
"""Engines: the model's own experts function, and sub-expert execution. Each is calibrated by itself."""


@dataclass(frozen=True)
class ForecastPoint:
    """One way to run the model. kind: full, skip, prune or sub-experts. run: makes a context in which the loaded model runs so."""

    name: str
    kind: str
    choice: Reads
    engine: str = STOCK
    run: Callable[[], Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds per step of a point at a concurrency, and the mean context of these steps."""

    seconds: float
    context: float


@dataclass(frozen=True)
class Row:
    """A point at a concurrency. distinct: mean pieces read per layer; ratio: to full; parts: seconds by what they are spent on.

    MeasuredStep rows are predicted at the context that they were measured at, without prompts.
    """

    concurrency: int
    name: str
    kind: str
    distinct: float
    seconds: float
    tokens_per_s: float
    ratio: float
    parts: dict[str, float]
    measured_tokens_per_s: float | None = None
    measured_ratio: float | None = None

    @property
    def error(self) -> float | None:
        """Relative error of the predicted tokens/s, where it was measured."""
        return None if self.measured_tokens_per_s is None else self.tokens_per_s / self.measured_tokens_per_s - 1

    @property
    def spent_on(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True)
class SpeedForecast(Result):
    """Every point at every concurrency, and what the prediction rests on. facts: routing, load, versions."""

    model: str
    rows: tuple[Row, ...]
    machines: Mapping[str, Fit | Machine]
    shape: Shape
    facts: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Points in the order of the table; the first is full."""
        return list(dict.fromkeys(row.name for row in self.rows))

    @property
    def concurrencies(self) -> list[int]:
        return list(dict.fromkeys(row.concurrency for row in self.rows))

    def row(self, concurrency: int, name: str) -> Row:
        return next(row for row in self.rows if (row.concurrency, row.name) == (concurrency, name))

    def median_error(self) -> float | None:
        """Median of |error| over the measured rows."""
        off = sorted(abs(row.error) for row in self.rows if row.error is not None)
        return (off[len(off) // 2] + off[(len(off) - 1) // 2]) / 2 if off else None

    def to_json(self) -> dict[str, Any]:
        """Rows, machines and facts as plain JSON values."""
        return {
            "model": self.model,
            "rows": [asdict(row) | {"error": row.error} for row in self.rows],
            "machines": {k: v.to_json() if isinstance(v, Fit) else asdict(v) for k, v in self.machines.items()},
            "median_error": self.median_error(),
            "shape": asdict(self.shape),
            **self.facts,
        }

    def to_records(self) -> list[dict[str, Any]]:
        """A row per concurrency and point."""
        return [asdict(row) | {"error": row.error} for row in self.rows]


def plain_points(shape: Shape, routing: Routing, keep: Sequence[float]) -> list[ForecastPoint]:
    """full; skip to every smaller number of experts per token, or to 8 of them; prune to every share in `keep`."""
    most = max(layer.chosen for layer in shape.layers)
    fewer = range(most - 1, 0, -1)
    stride = -(-len(fewer) // MOST_SKIPS) or 1
    points = [ForecastPoint(f"top-{most}", "full", (Read(tuple(routing.shares(most))),))]
    points += [ForecastPoint(f"top-{n}", "skip", (Read(tuple(routing.shares(n))),)) for n in fewer[stride - 1 :: stride]]
    for share in keep:
        count = max(kept_experts(layer.experts, layer.chosen, share) for layer in shape.layers)
        points.append(ForecastPoint(f"{count} experts", "prune", (Read(tuple(routing.shares(most, share))),)))
    return points


def predict(
    shape: Shape,
    points: Sequence[ForecastPoint],
    machines: Mapping[str, Machine],
    loads: Sequence[StepLoad],
    measured: Mapping[tuple[str, int, str], MeasuredStep] | None = None,
) -> tuple[Row, ...]:
    """A row per load and point; points[0] is full. measured: by (engine, concurrency, point)."""
    rows = []
    for asked in loads:
        batch = int(asked.batch)
        for point in points:
            was = (measured or {}).get((point.engine, batch, point.name))
            full = (measured or {}).get((point.engine, batch, points[0].name))
            load = StepLoad(batch, was.context) if was else asked
            need, machine = terms(shape, point.choice, load), machines[point.engine]
            seconds = machine.seconds(need)
            whole = machines[STOCK].seconds(terms(shape, points[0].choice, load))
            pieces = [float(distinct(shares, batch)) for shares in point.choice[0].shares]
            row = Row(
                batch,
                point.name,
                point.kind,
                sum(pieces) / len(pieces),
                seconds,
                batch / seconds,
                whole / seconds,
                machine.parts(need),
            )
            if was:
                row = _with(row, batch / was.seconds, full.seconds / was.seconds if full else None)
            rows.append(row)
    return tuple(rows)


def _with(row: Row, tokens_per_s: float, ratio: float | None) -> Row:
    return Row(**{**vars(row), "measured_tokens_per_s": tokens_per_s, "measured_ratio": ratio})
