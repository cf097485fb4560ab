"""A forecast as one offline HTML page and as a picture: ratio to full, and tokens/s, against concurrency."""

from __future__ import annotations

import io
import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replace_file
from ..forecast.speed import PAYS, SpeedForecast
from .chart import AXIS, INK, MUTED, NARROW, WIDE, libraries
from .html import _script_json
from .png import deflated
from .speed_summary import machine_lines, sentences

if TYPE_CHECKING:
    import altair as alt

SHADES = {  # dear to cheap within a kind; the kinds are told apart by marker as well
    "full": ["#57606a"],
    "skip": ["#8fc1e3", "#56b4e9", "#2b8cc9", "#0072b2", "#005a8c", "#004166", "#002e49", "#001c2e"],
    "prune": ["#d55e00", "#8a3d00", "#f0955a"],
    "sub-experts": ["#66c2a5", "#009e73", "#00664a"],
}
SHAPES = {"full": "circle", "skip": "circle", "prune": "square", "sub-experts": "triangle-up"}
TITLES = {"ratio": "Where running less pays", "tokens_per_s": "Tokens per second"}


def write_forecast(forecast: SpeedForecast, folder: Path) -> None:
    """forecast.json, .html and .png in an existing folder. UsageError where the libraries of `moe-prism[report]` are missing."""
    libraries()
    replace_file(folder / "forecast.html", render(forecast).encode())
    replace_file(folder / "forecast.png", png(forecast))
    replace_file(folder / "forecast.json", (json.dumps(forecast.to_json(), indent=1) + "\n").encode())


def png(forecast: SpeedForecast) -> bytes:
    """The ratio chart at twice the size."""
    buffer = io.BytesIO()
    chart(forecast, "ratio").save(buffer, format="png", scale_factor=2)
    return deflated(buffer.getvalue())


def render(forecast: SpeedForecast) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    libraries()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("forecast.html.j2").read_text(encoding="utf-8"))
    figures = [
        # ours, with every text in it escaped by the renderer
        {"alt": TITLES[y], "wide": Markup(_svg(chart(forecast, y))), "narrow": Markup(_svg(chart(forecast, y, NARROW)))}  # noqa: S704
        for y in TITLES
    ]
    return template.render(
        forecast=forecast,
        sentences=sentences(forecast),
        machine=machine_lines(forecast),
        figures=figures,
        pays=PAYS,
        data=_script_json(forecast.to_json()),
    )


def _svg(chart: alt.LayerChart) -> str:
    buffer = io.StringIO()
    chart.save(buffer, format="svg")
    return buffer.getvalue()


def chart(forecast: SpeedForecast, y: str, width: int = WIDE) -> alt.LayerChart:
    """`ratio` or `tokens_per_s` against concurrency (log); lines are predicted, hollow points measured."""
    alt = libraries()
    data = rows(forecast)
    kinds = {row["point"]: row["kind"] for row in data}
    names = [name for name in forecast.names if y != "ratio" or kinds[name] != "full"]
    data = [row for row in data if row["point"] in names]
    legend = alt.Legend(title=None, orient="top" if width > 500 else "bottom", columns=0 if width > 500 else 2, symbolSize=90)
    color = alt.Color("point:N", legend=legend).scale(domain=names, range=_colors(names, kinds))
    shape = alt.Shape("point:N", legend=legend).scale(domain=names, range=[SHAPES[kinds[name]] for name in names])
    x = (
        alt.X("concurrency:Q", title="Requests that decode together")
        .scale(type="log", base=2)
        .axis(values=forecast.concurrencies)
    )
    scale = {"zero": False} if y == "ratio" else {"type": "log"}
    base = alt.Chart(alt.Data(values=data)).encode(x=x, y=alt.Y(f"{y}:Q", title=None).scale(**scale).axis(format="~g"))
    layers = [
        base.mark_line(strokeWidth=2).encode(color=color),
        base.mark_point(filled=True, size=55, opacity=1).encode(color=color, shape=shape),
    ]
    if any(row["measured_ratio"] is not None for row in data):
        seen = base.transform_filter(f"datum.measured_{y} != null").mark_point(size=80, fill="white", strokeWidth=2)
        layers.append(seen.encode(y=alt.Y(f"measured_{y}:Q", title=None), color=color, shape=shape))
    if y == "ratio":
        line = alt.Chart(alt.Data(values=[{"one": 1.0}])).mark_rule(color=MUTED, strokeDash=[4, 4]).encode(y="one:Q")
        layers = [line, *layers]
    return _dress(alt.layer(*layers), forecast, y, width)


def rows(forecast: SpeedForecast) -> list[dict[str, Any]]:
    """Plain data of the charts, one row per concurrency and point."""
    return [
        {
            "point": row.name,
            "kind": row.kind,
            "concurrency": row.concurrency,
            "ratio": row.ratio,
            "tokens_per_s": row.tokens_per_s,
            "measured_ratio": row.measured_ratio,
            "measured_tokens_per_s": row.measured_tokens_per_s,
        }
        for row in forecast.rows
    ]


def _colors(names: list[str], kinds: dict[str, str]) -> list[str]:
    """Shades in the order of the points within their kind."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        shades = SHADES[kinds[name]]
        found.append(shades[seen.get(kinds[name], 0) % len(shades)])
        seen[kinds[name]] = seen.get(kinds[name], 0) + 1
    return found


def _dress(chart: alt.LayerChart, forecast: SpeedForecast, y: str, width: int) -> alt.LayerChart:
    alt = libraries()
    what = "Tokens/s as a ratio to the full model." if y == "ratio" else "Log scale."
    measured = " Hollow: measured." if forecast.median_error() is not None else ""
    heading = alt.TitleParams(
        TITLES[y], subtitle=[f"{what} Lines: predicted.{measured}"], anchor="start", frame="group", offset=12
    )
    wide = width > 500
    return (
        chart.properties(width=width, height=360 if wide else 280, title=heading, background="white", padding=16 if wide else 6)
        .configure(font="Roboto, Helvetica, Arial, sans-serif")
        .configure_view(strokeWidth=0)
        .configure_title(fontSize=19 if wide else 16, color=INK, subtitleColor=MUTED, subtitleFontSize=13, subtitlePadding=7)
        .configure_axis(**AXIS)
    )
