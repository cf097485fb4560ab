"""One offline page about several runs: their curves on one chart, and every number as a table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..frontier.evaluation import score_cell
from ..frontier.record import write_atomic
from ..frontier.runs import SHARES, MeasuredRun, doubts
from . import chart
from .summary import KL_ZERO, kl, percent

if TYPE_CHECKING:
    import altair as alt

TITLE = "Drift of every run at each price"
COLOURS = [chart.BLUE, chart.VERMILLION, *chart.OTHERS]


def write_runs(runs: Sequence[MeasuredRun], path: str | Path) -> None:
    """Write the page to `path`, at once or not at all."""
    chart.libraries()
    write_atomic(path, render(runs).encode())


def render(runs: Sequence[MeasuredRun]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, kl=kl)
    template = environment.from_string(files(__package__).joinpath("runs.html.j2").read_text(encoding="utf-8"))
    drawn = {name: Markup(chart.svg(curves(runs, width))) for name, width in (("wide", chart.WIDE), ("narrow", chart.NARROW))}  # noqa: S704
    return template.render(
        runs=runs,
        shares=SHARES,
        doubts=doubts(runs),
        figure=drawn,
        best={run.name: _best(run) for run in runs},
        tasks=_tasks(runs),
    )


def curves(runs: Sequence[MeasuredRun], width: int = chart.WIDE) -> alt.LayerChart:
    """KL to the source (log) of every run's Pareto points against the share of its full model's bytes."""
    alt = chart.libraries()
    data = [
        {"run": run.name, "cost": 100 * p.active_expert_bytes / run.full_bytes, "kl": p.kl, "name": p.name}
        for run in runs
        for p in run.frontier.every
        if p.pareto and p.kl >= KL_ZERO
    ]
    names = [run.name for run in runs]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    shapes = [chart.SHAPES[i % len(chart.SHAPES)] for i in range(len(names))]
    legend = alt.Legend(title=None, orient="top", columns=0 if width > 500 else 1, labelFontSize=13, labelLimit=width)
    colour = alt.Color("run:N", legend=legend).scale(domain=names, range=colours)
    shape = alt.Shape("run:N", legend=legend).scale(domain=names, range=shapes)
    across = chart.COST_AXIS if width > 500 else "% of the full model's bytes"
    base = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X("cost:Q", title=across).scale(nice=False, zero=False, padding=20),
        y=alt.Y("kl:Q", title=None).scale(type="log", nice=False, padding=20).axis(format="~g"),
        color=colour,
    )
    layers = alt.layer(
        base.mark_line(strokeWidth=2).encode(order="cost:Q"), base.mark_point(size=90, filled=True, opacity=1).encode(shape=shape)
    )
    words = ["KL divergence to each run's own source, nats per token, log scale.", "Lower is better. Pareto points only."]
    return chart.dressed(layers, TITLE, words, width)


def _best(run: MeasuredRun) -> list[Any]:
    return [run.within(share * run.full_bytes) for share in SHARES]


def _tasks(runs: Sequence[MeasuredRun]) -> list[dict[str, Any]]:
    """Rows (task, metric, cells) over the points of all runs that have any."""
    columns = [(run.name, point) for run in runs if run.evaluation for point in run.evaluation.points]
    keys = list(dict.fromkeys((s.task, s.metric) for _, point in columns for s in point.scores))
    known = {(name, point.name, s.task, s.metric): s for name, point in columns for s in point.scores}
    rows = [(t, m, [score_cell(known.get((name, point.name, t, m))) for name, point in columns]) for t, m in keys]
    return [{"columns": [(name, point.name) for name, point in columns], "rows": rows}] if rows else []
