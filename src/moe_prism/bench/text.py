"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

Row = list[str]
ALL = "all"


def single_rows(result: dict[str, Any]) -> tuple[Row, list[Row]]:
    """One row per rate and class."""
    heads = [
        "rate",
        "class",
        "offered",
        "goodput",
        "attained",
        "quality",
        "tok/s",
        "TTFT p50",
        "p99 ms",
        "TPOT p50",
        "p99 ms",
        "stalls",
    ]
    rows = []
    for run in result["runs"]:
        for name, figures in ((ALL, run), *run["classes"].items()):
            rows.append([f"{run['rate']:g}", name, str(figures["offered"]), *_figures(figures), str(figures["itl"]["stalls"])])
    return heads, rows


def _figures(figures: dict[str, Any]) -> Row:
    return [
        f"{figures['goodput']:.2f}",
        _share(figures["attainment"]),
        _number(figures["quality"], 3),
        f"{figures['output_tokens_per_second']:.0f}",
        *(_ms(figures[name][q]) for name in ("ttft", "tpot") for q in ("p50", "p99")),
    ]


def compare_rows(rate: dict[str, Any]) -> tuple[Row, list[Row]]:
    """One row per policy: medians over the repeats."""
    made, kinds = rate["policies"], _kinds(rate)
    heads = ["policy", "goodput", "attained", "quality", "tok/s", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms", *kinds]
    heads += ["to fifo", "to prism", "simulated/real"]
    rows = []
    for label, runs in made.items():
        real = runs["real"]
        row = [
            label,
            f"{_median(r['goodput'] for r in real):.2f}",
            _share(_median(r["attainment"] for r in real)),
            _number(_median(r["quality"] for r in real), 3),
            f"{_median(r['output_tokens_per_second'] for r in real):.0f}",
            *(_ms(_median(r[name][q] for r in real)) for name in ("ttft", "tpot") for q in ("p50", "p99")),
            *(_share(_median(r["classes"].get(kind, {}).get("attainment") for r in real)) for kind in kinds),
        ]
        found = rate["ratios"][label]
        rows.append([*row, *(_ratio(found.get(name)) for name in ("to fifo", "to prism", "simulated to real"))])
    return heads, rows


def notes(runs: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """What is wrong with runs, one line each."""
    lines = []
    for name, run in runs:
        lines += [f"VOID {name}: {text}" for text in run["void"]]
        lines += [f"note {name}: {text}" for text in run["warnings"]]
        lines += [f"failed {name}: {count} x {text}" for text, count in run["failures"].items()]
    return lines


def compare_notes(rate: dict[str, Any]) -> list[str]:
    """What a reader of a comparison must know beside its numbers."""
    return notes((f"{label} {i + 1}", run) for label, runs in rate["policies"].items() for i, run in enumerate(runs["real"]))


def _kinds(rate: dict[str, Any]) -> Sequence[str]:
    return sorted({kind for runs in rate["policies"].values() for run in runs["real"] for kind in run["classes"]})


def _median(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None]
    return median(known) if known else float("nan")


def _share(value: float | None) -> str:
    return "-" if value is None or value != value else f"{100 * value:.0f}%"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def _ms(value: float | None) -> str:
    return "-" if value is None or value != value else f"{1000 * value:.1f}"


def _ratio(figures: dict[str, Any] | None) -> str:
    """Of the goodput, with its least and most."""
    found = figures and figures["goodput"]
    if not found or found["median"] is None:
        return "-"
    return f"{found['median']:.2f} ({found['least']:.2f}..{found['most']:.2f})"
