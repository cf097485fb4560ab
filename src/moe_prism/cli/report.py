"""`moe-prism report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from .output import note, table, written

if TYPE_CHECKING:
    from ..frontier.runs import MeasuredRun


def report(
    runs: list[Path],
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    json: bool = False,
) -> None:
    """Compare measured runs: their quality at equal shares of bytes, and their tasks.

    Parameters
    ----------
    runs: Folders with a frontier.json, or such files.
    out: An .html file to write as well.
    json: One JSON object on stdout.
    """
    from ..files import check_writable
    from ..frontier.runs import doubts, read_runs

    check_writable(out)
    found = read_runs(runs)
    said = doubts(found)
    for line in said:
        note(f"warning: {line}")
    facts = {"runs": [run.to_json() for run in found], "doubts": said}
    with written(facts, show(found), json):
        if out is not None:
            from ..report.runs import write_runs

            write_runs(found, out)
            note(f"report: {out}")


def show(runs: list[MeasuredRun]) -> str:
    """One table of prices, and one of tasks per run that has any."""
    from ..frontier.evaluation import score_rows
    from ..frontier.runs import SHARES

    lines = []
    for run in runs:
        best = [run.within(share * run.full_bytes) for share in SHARES]
        cells = [f"{p.kl:.4f} ({p.name})" if p else "-" for p in best]
        lines.append((run.name, run.frontier.model, f"{run.full_bytes / 1e6:.3f}", *cells, run.text))
    heads = ("run", "model", "full MB", *(f"KL at {share:.0%}" for share in SHARES), "text")
    text = [table(heads, lines)]
    for run in runs:
        if run.evaluation is not None:
            points = run.evaluation.points
            text += ["", f"tasks of {run.name}", table(("task", "metric", *(p.name for p in points)), score_rows(points))]
    return "\n".join(text)
