"""What a forecast says, in whole sentences computed from it."""

from __future__ import annotations

from collections.abc import Sequence

from ..forecast.speed import ELASTIC, PAYS, STOCK, Row, SpeedForecast
from ..forecast.step_time import Fit

KINDS = {"skip": "Skipping experts", "prune": "Pruning", "sub-experts": "Sub-experts"}


def sentences(forecast: SpeedForecast) -> list[str]:
    """Where each kind pays, and how far the prediction was off where it was measured."""
    found = [_where(forecast, kind) for kind in KINDS if any(row.kind == kind for row in forecast.rows)]
    error = forecast.median_error()
    if error is not None:
        off = max(abs(row.error) for row in forecast.rows if row.error is not None)
        found.append(f"Measured tokens/s differ from the prediction by {error:.1%} in the median and {off:.1%} at most.")
    return found


def _where(forecast: SpeedForecast, kind: str) -> str:
    names = [name for name in forecast.names if any(row.name == name and row.kind == kind for row in forecast.rows)]
    parts = []
    for name in names:
        rows = [forecast.row(batch, name) for batch in forecast.concurrencies]
        paying = [row for row in rows if row.ratio >= PAYS]
        if not paying:
            parts.append(f"{name} nowhere (at most {max(r.ratio for r in rows):.2f}x)")
            continue
        best = max(paying, key=lambda row: row.ratio)
        parts.append(f"{name} at {_ranges(forecast, paying)} (most, {best.ratio:.2f}x, at {best.concurrency})")
    return f"{KINDS[kind]} pays {PAYS:g}x or more: {'; '.join(parts)}.".replace("Sub-experts pays", "Sub-experts pay")


def _ranges(forecast: SpeedForecast, paying: Sequence[Row]) -> str:
    """[1, 2, 4, 16] of 1,2,4,8,16 -> "1-4, 16"."""
    wanted = {row.concurrency for row in paying}
    runs: list[list[int]] = []
    previous = False
    for batch in sorted(forecast.concurrencies):
        if batch in wanted:
            runs[-1].append(batch) if previous else runs.append([batch])
        previous = batch in wanted
    return "concurrency " + ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def machine_lines(forecast: SpeedForecast) -> list[str]:
    """The machine and what the prediction assumes, a line each."""
    titles = {STOCK: "machine", ELASTIC: "machine, sub-experts"}
    lines = []
    for name, found in forecast.machines.items():
        machine = found.machine if isinstance(found, Fit) else found
        unmet = found.unmet if isinstance(found, Fit) else ()
        numbers = [
            "bandwidth not reached" if "bandwidth" in unmet else f"{machine.bandwidth / 1e9:.4g} GB/s",
            "peak not reached" if "peak" in unmet else f"{machine.peak / 1e9:.4g} GFLOP/s",
            f"{1e3 * machine.fixed:.3g} ms per step",
            *([f"{1e6 * machine.token:.3g} us per token"] if machine.token else []),
        ]
        how = f"fitted to {_steps(found)}" if isinstance(found, Fit) else "given"
        lines.append(f"{titles[name]}: {', '.join(numbers)} ({how})")
    routing, load = forecast.facts["routing"], forecast.facts["load"]
    counted = f"{routing['source']}, {routing['tokens']} tokens" if routing["tokens"] else routing["source"]
    lines.append(
        f"routing: {counted}; context {load['context']:g}, {load['prompt_per_token']:g} prompt tokens per generated token"
    )
    return lines


def _steps(found: Fit) -> str:
    return f"measured steps, off by {found.median:.1%} in the median and {found.worst:.1%} at most"
