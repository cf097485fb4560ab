"""The frontier as a picture: an altair specification, rendered to SVG or PNG without a browser."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UsageError
from ..frontier.pareto import pareto
from ..frontier.record import Frontier, MeasuredPoint
from .labels import ABOVE, BELOW, LINE, SIZE, SPOTS, Box, Label, Point, Spot, place, position
from .png import deflated
from .summary import KL_ZERO, full_bytes, main_rule, perplexity, series

if TYPE_CHECKING:
    import altair as alt

PLAIN = "plain top-k"
ROUNDED = "bits alone"
STANDING = (PLAIN, ROUNDED)
BLUE, VERMILLION = "#0072b2", "#d55e00"  # Okabe and Ito: told apart with every kind of colour vision
OTHERS = ["#009e73", "#cc79a7", "#8a6d00", "#56b4e9"]
SHAPES = ["circle", "square", "diamond", "cross", "triangle-down"]
INK, MUTED, GRID = "#1b1f24", "#57606a", "#e6e8eb"
AXIS = {
    "gridColor": GRID,
    "domainColor": MUTED,
    "tickColor": MUTED,
    "labelColor": INK,
    "labelFontSize": 12,
    "titleColor": INK,
    "titleFontSize": 13,
    "titleFontWeight": "normal",
    "titlePadding": 10,
}
WIDE = 720
"""Width of the chart area in CSS pixels on a desk; `NARROW` is for a phone."""
NARROW = 300
KL_TITLE, PPL_TITLE, TIME_TITLE = "How far the output drifts at each price", "Perplexity at each price", "Drift at each speed"
COST_AXIS = "Expert weights read per token, % of the full model"


def libraries() -> Any:
    """altair, or a UsageError that says how to get what the report needs."""
    try:
        import altair
        import jinja2  # noqa: F401 - all three are one extra; failing early beats failing after the charts
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the report needs {error.name}, which is not installed", "pip install 'moe-prism[report]'") from error
    return altair


def rows(frontier: Frontier) -> list[dict[str, Any]]:
    """One row of plain data per point, with its series, its cost in percent of the full model and its label."""
    full, main = full_bytes(frontier), main_rule(frontier)
    tagged = [(series(p.rule), p) for p in frontier.points] + [(PLAIN, p) for p in frontier.baseline_topk]
    tagged += [(ROUNDED, p) for p in frontier.baseline_bits]
    floor = kl_floor(frontier)
    labelled = _labelled([p for p in frontier.points if p.rule == main], full)
    tagged.sort(key=lambda item: item[1].rule == main)  # drawn last, so that it is on top
    return [
        {
            "name": p.name,
            "series": series,
            "cost": 100 * p.active_expert_bytes / full,
            "kl": max(p.kl, floor),
            "zero": p.kl < KL_ZERO,
            "ppl": p.ppl,
            "ms": p.time.ms_per_token if p.time else None,
            "pareto": p.pareto,
            "above": p.name if series in STANDING else "",
            "below": f"K={p.k_slots:.3g}" if p.name in labelled and series not in STANDING else "",
        }
        for series, p in tagged
    ]


def series_names(frontier: Frontier) -> list[str]:
    """Legend order: the main rule, plain top-k, bits alone, then the other rules as measured."""
    main = series(main_rule(frontier))
    found = dict.fromkeys(row["series"] for row in rows(frontier))
    return [main, *[s for s in STANDING if s in found], *[s for s in found if s not in (main, *STANDING)]]


def kl_floor(frontier: Frontier) -> float:
    """Where KL = 0 is drawn: a log axis has no zero, so it sits below the smallest step that is one."""
    real = [p.kl for p in frontier.every if p.kl >= KL_ZERO]
    return min(real) / 2.5 if real else KL_ZERO


def kl_chart(frontier: Frontier, width: int = WIDE) -> alt.LayerChart:
    """KL to the source model (log) against active expert bytes."""
    return _kl_chart(frontier, rows(frontier), _Horizontal("cost", COST_AXIS, KL_TITLE), width)


def _kl_chart(frontier: Frontier, data: list[dict[str, Any]], across: _Horizontal, width: int) -> alt.LayerChart:
    low, high = kl_floor(frontier), max([row["kl"] for row in data], default=1.0)
    axis = {"values": _decades(low * 1.5, high), "format": "~g"}
    scale = {"type": "log", "domain": [low / 1.25, max(high, low * 10) * 1.6], "nice": False}
    words = "KL divergence to the full model in nats per token, log scale. Lower is better."
    subtitle = _subtitle(words, across.better, data, width)
    spot = Spot("right", "bottom", 6, -8) if across.spread else Spot("right", "middle", -10, 0)  # above the bar of its spread
    note = _Note("full model: KL 0", spot)
    return _layers(frontier, data, across, _Figure("kl", scale, axis, subtitle, note), width)


def ppl_chart(frontier: Frontier, width: int = WIDE) -> alt.LayerChart:
    """Perplexity against active expert bytes; a log axis only where plain top-k falls off a cliff."""
    data = rows(frontier)
    values = [row["ppl"] for row in data] or [1.0]
    low, high = min(values), max(values)
    log = low > 0 and high > 5 * low
    share, dy = (0.12, 23) if width > 500 else (0.2, 36)  # a phone's labels are as large as a desk's: the note goes below theirs
    pad = (high / low) ** share if log else max((high - low) * share, high * 1e-3)
    domain = [low / pad, high * pad] if log else [low - pad, high + pad]
    scale = {"type": "log" if log else "linear", "domain": domain, "nice": False, "zero": False}
    axis = {"values": _decades(low, high), "format": "~g"} if log else {"tickCount": 6}
    across = _Horizontal("cost", COST_AXIS, PPL_TITLE)
    subtitle = _subtitle("Perplexity per token on held-out text. Lower is better.", across.better, data, width)
    zero = [row for row in data if row["zero"]]
    note = _Note(f"full model: {perplexity(zero[-1]['ppl'])}" if zero else "", Spot("right", "middle", 6, dy))
    return _layers(frontier, data, across, _Figure("ppl", scale, axis, subtitle, note), width)


def time_chart(frontier: Frontier, width: int = WIDE) -> alt.LayerChart:
    """KL to the source model (log) against the measured time of a token; points without one are left out."""
    alt = libraries()
    every = {p.name: p.time for p in frontier.every if p.time}
    data = [row | asdict(every[row["name"]]) for row in rows(frontier) if row["name"] in every]
    for row, best in zip(data, pareto([row["ms"] for row in data], [row["kl"] for row in data]), strict=True):
        row["pareto"] = best
    batch = next(iter(every.values())).batch
    together = "one sequence decodes" if batch == 1 else f"{batch} sequences decode together"
    across = _Horizontal("ms", f"Milliseconds per token while {together}", TIME_TITLE, "fast", ("low", "high"))
    shown = [
        row for row in data if row["series"] in (*STANDING, series(main_rule(frontier)))
    ]  # of all of them it would be a thicket
    bars = alt.Chart(alt.Data(values=shown)).mark_rule(color=MUTED, opacity=0.4)
    return _kl_chart(frontier, data, across, width) + bars.encode(x="low:Q", x2="high:Q", y="kl:Q")


def svg(chart: alt.LayerChart) -> str:
    """The chart as one <svg> element; its only address is the SVG namespace."""
    buffer = io.StringIO()
    chart.save(buffer, format="svg")
    return buffer.getvalue()


def png(chart: alt.LayerChart) -> bytes:
    """The chart at twice the size."""
    buffer = io.BytesIO()
    chart.save(buffer, format="png", scale_factor=2)
    return deflated(buffer.getvalue())


class _Horizontal(NamedTuple):
    """What a chart shows to the right: a column of the data, in which words, and the chart's own title."""

    x: str
    words: str
    title: str
    better: str = "cheap"
    spread: tuple[str, ...] = ()  # further columns that have to fit


class _Note(NamedTuple):
    """What is said of the full model, beside its point."""

    text: str
    spot: Spot


class _Figure(NamedTuple):
    """What a chart shows upwards: a column of the data, on which scale and axis, under which words."""

    y: str
    scale: Mapping[str, Any]
    axis: Mapping[str, Any]
    subtitle: list[str]
    note: _Note


def _layers(frontier: Frontier, data: list[dict[str, Any]], across: _Horizontal, figure: _Figure, width: int) -> alt.LayerChart:
    alt = libraries()
    names = series_names(frontier)
    color, shape = _encodings(alt, names, width)
    costs = [row[x] for row in data for x in (across.x, *across.spread)] or [0.0, 100.0]
    left, right = (0.09, 0.05) if width > 500 else (0.27, 0.08)  # room for the label of the cheapest point
    span = max(max(costs) - min(costs), 0.1 * max(costs))
    x = alt.X(f"{across.x}:Q", title=across.words if width > 500 else textwrap.wrap(across.words, 34))
    along = {"domain": [min(costs) - left * span, max(costs) + right * span], "nice": False, "zero": False}
    x, data = x.scale(**along), _placed(data, (across.x, along), figure, width)
    base = alt.Chart(alt.Data(values=data)).encode(
        x=x.axis(tickCount=8 if width > 500 else 5),
        y=alt.Y(f"{figure.y}:Q", title=None).scale(**figure.scale).axis(**figure.axis),
    )
    curve = base.transform_filter("!datum.zero") if figure.y == "kl" else base
    lines = [
        curve.transform_filter(alt.datum.series == name)
        .mark_line(
            strokeWidth=2.5 if i == 0 else 1.5, strokeDash=[5, 4] if name in STANDING else [1, 0], opacity=0.9 if i < 2 else 0.6
        )
        .encode(color=color, order="cost:Q")  # neighbours in price, also where that is not the axis
        for i, name in enumerate(names)
    ]
    marks = {"size": 90, "strokeWidth": 2, "opacity": 1}
    said = {"color": color, "shape": shape, "description": "name:N"}  # by which the page's script finds a point's marker
    kept = base.transform_filter("datum.pareto").mark_point(filled=True, **marks).encode(**said)
    beaten = base.transform_filter("!datum.pareto").mark_point(fill="white", **marks).encode(**said)
    labels = [
        base.transform_filter(alt.datum.spot == i).mark_text(fontSize=SIZE, **spot._asdict()).encode(text="label:N", color=color)
        for i, spot in enumerate(SPOTS)
    ]
    zero = alt.Chart(alt.Data(values=[row for row in data if row["zero"]][-1:])).mark_text(
        fontSize=SIZE, color=INK, **figure.note.spot._asdict()
    )
    note = zero.encode(x=f"{across.x}:Q", y=f"{figure.y}:Q", text=alt.value(figure.note.text))
    return dressed(alt.layer(*lines, beaten, kept, *labels, note), across.title, figure.subtitle, width)


def _placed(
    data: list[dict[str, Any]], across: tuple[str, Mapping[str, Any]], figure: _Figure, width: int
) -> list[dict[str, Any]]:
    """The rows with what is written beside each, and the number of the spot where; -1 for nothing.

    The standing rows are told apart by their names alone, so theirs come first.
    """
    height = _height(width)
    at = [(position(row[across[0]], across[1], width), height - position(row[figure.y], figure.scale, height)) for row in data]
    note = next((figure.note.spot.box(*at[i], figure.note.text) for i in reversed(range(len(data))) if data[i]["zero"]), None)
    named = sorted((i for i, row in enumerate(data) if row["above"] or row["below"]), key=lambda i: not data[i]["above"])
    wanted = [Label(*at[i], data[i]["above"] or data[i]["below"], ABOVE if data[i]["above"] else BELOW) for i in named]
    lines: dict[str, list[Point]] = {}
    for i in sorted(range(len(data)), key=lambda i: data[i]["cost"]):
        if not (figure.y == "kl" and data[i]["zero"]):
            lines.setdefault(data[i]["series"], []).append(at[i])
    chosen = place(wanted, Box(0, width, -LINE, height), at, [note] if note else [], list(lines.values()))
    spots = dict(zip(named, chosen, strict=True))
    found = [SPOTS.index(spot) if (spot := spots.get(i)) else -1 for i in range(len(data))]
    return [row | {"label": row["above"] or row["below"], "spot": number} for row, number in zip(data, found, strict=True)]


def _height(width: int) -> int:
    return 380 if width > 500 else 320


def _encodings(alt: Any, names: Sequence[str], width: int) -> tuple[Any, Any]:
    colors = [BLUE, *[VERMILLION for s in names if s == PLAIN], *OTHERS]
    shapes = [SHAPES[0], *["triangle-up" for s in names if s == PLAIN], *SHAPES[1:]]
    # the browser's font may be wider than the one that the places were computed with: room for a fifth more
    room = 4 + max(map(len, names), default=0) * 13 // 10
    legend = alt.Legend(
        title=None, orient="top", columns=0 if width > 500 else 1, symbolSize=110, labelFontSize=13, columnPadding=room
    )
    # one domain for both, so that the two legends become one
    fit = [i % 6 for i in range(len(names))]
    turned = [i % 6 + i // 6 for i in range(len(names))]  # from the seventh on a colour comes again, with another shape
    color = alt.Color("series:N", legend=legend).scale(domain=list(names), range=[colors[i % len(colors)] for i in fit])
    shape = alt.Shape("series:N", legend=legend).scale(domain=list(names), range=[shapes[i % len(shapes)] for i in turned])
    return color, shape


def dressed(chart: alt.LayerChart, title: str, subtitle: list[str], width: int) -> alt.LayerChart:
    """The chart with its size, title and fonts."""
    alt = libraries()
    lines = textwrap.wrap(title, 60 if width > 500 else 28)  # in the widest font that a phone may have
    heading = alt.TitleParams(lines, subtitle=subtitle, anchor="start", frame="group", offset=14)
    return (
        chart.properties(width=width, height=_height(width), title=heading, background="white", padding=16 if width > 500 else 6)
        .configure(font="Roboto, Helvetica, Arial, sans-serif")
        .configure_view(strokeWidth=0)
        .configure_title(
            fontSize=19 if width > 500 else 16, color=INK, subtitleColor=MUTED, subtitleFontSize=13, subtitlePadding=7
        )
        .configure_axis(**AXIS)
    )


def _labelled(points: Sequence[MeasuredPoint], full: float) -> set[str]:
    """The points nearest to three quarters, half and the lowest price: enough to read the curve, few enough not to collide."""
    if not points:
        return set()
    low = min(p.active_expert_bytes for p in points) / full
    return {min(points, key=lambda p: abs(p.active_expert_bytes / full - share)).name for share in (0.75, 0.5, low)}


def _decades(low: float, high: float) -> list[float]:
    """1-2-5 tick values that lie between low and high (both > 0)."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{m}e{e}") for e in exponents for m in (1, 2, 5)]
    inside = [t for t in ticks if low <= t <= high * 1.6]
    return inside if len(inside) <= 12 else [t for t in inside if f"{t:e}".startswith("1")]


def _subtitle(text: str, better: str, data: list[dict[str, Any]], width: int) -> list[str]:
    hollow = f"Hollow markers: another point is at least as {better} and as close." if not all(r["pareto"] for r in data) else ""
    limit = 105 if width > 500 else 40
    return [*textwrap.wrap(text, limit), *textwrap.wrap(hollow, limit)]
