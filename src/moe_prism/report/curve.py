"""Losses of a training as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError
from .chart import BLUE, VERMILLION, WIDE, dressed, libraries, svg

POINTS = 400  # of the line: means of as many stretches


def curve_svg(train: Sequence[float], held: Sequence[tuple[int, float]], name: str, unit: str) -> str | None:
    """The loss of every step, averaged over short stretches, and on held-out examples. None where no picture can be drawn here."""
    try:
        alt = libraries()
    except UsageError:
        return None
    size = -(-len(train) // POINTS)
    means = [sum(train[i : i + size]) / len(train[i : i + size]) for i in range(0, len(train), size)]
    rows = [{"step": min(len(train), (i + 1) * size), "loss": m, "of": "trained on"} for i, m in enumerate(means)]
    rows += [{"step": step, "loss": loss, "of": "held out"} for step, loss in held]
    colour = alt.Scale(domain=["trained on", "held out"], range=[BLUE, VERMILLION])
    shown = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("step:Q", title="Steps"),
        y=alt.Y("loss:Q", title=unit[0].upper() + unit[1:], scale=alt.Scale(zero=False)),
        color=alt.Color("of:N", title=None, scale=colour, legend=alt.Legend(orient="top-right")),
    )
    line = shown.transform_filter("datum.of == 'trained on'").mark_line(strokeWidth=1.5)
    points = shown.transform_filter("datum.of == 'held out'").mark_line(point=True)
    return svg(dressed(alt.layer(line, points), f"Training of {name}", ["Lower is better."], WIDE))
