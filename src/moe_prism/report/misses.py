"""A page of miss curves: every cache policy against the bound, at expert and at sub-expert granularity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..frontier.record import write_atomic
from . import chart
from .heat import Shares, by_layer
from .heat import draw as draw_heat

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>Miss curves of {{ facts.model }}</title><style>
:root { --ink: #1b1f24; --muted: #57606a; --page: #f6f7f9; --line: #d8dde3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --muted: #9aa4af; --page: #101418; --line: #313943; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.15; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } .bound { color: var(--muted); }
figure { margin: 1rem 0; padding: .5rem; background: #fff; border: 1px solid var(--line); border-radius: 10px; }
figure svg { display: block; width: 100%; max-width: 860px; height: auto; margin: 0 auto; } .narrow { display: none; }
@media (max-width: 560px) { .wide { display: none; } .narrow { display: block; } th, td { padding: .2rem .4rem; } }
</style></head><body>
<h1>Miss curves of {{ facts.model }}</h1>
<p>{{ facts.tokens }} decoded tokens of held-out text, {{ facts.k }} of {{ facts.experts }} experts per token in {{ facts.layers }} layers.
Policies were fitted on other text. Dashed: no policy can be below <code>belady</code>, which knows the future;
<code>sch</code> knows the next 16 tokens.</p>
{% for part in parts %}
<h2>{{ part.title }}</h2>
<figure role="img" aria-label="{{ part.title }}: misses per token against cache size, all policies">
<div class="wide" aria-hidden="true">{{ part.wide }}</div><div class="narrow" aria-hidden="true">{{ part.narrow }}</div></figure>
<div class="scroll"><table><caption>Hit rate, %, by slots per layer</caption>
<thead><tr><th>policy</th>{% for size in part.sizes %}<th>{{ size }}</th>{% endfor %}</tr></thead><tbody>
{% for row in part.rows %}<tr{% if row.bound %} class="bound"{% endif %}><td>{{ row.policy }}</td>
{% for rate in row.rates %}<td>{{ "%.1f"|format(100 * rate) }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
<h2>Which experts are used</h2>
<figure role="img" aria-label="How often each expert of each layer is used">
<div class="wide" aria-hidden="true">{{ heat.wide }}</div><div class="narrow" aria-hidden="true">{{ heat.narrow }}</div></figure>
<div class="scroll"><table><caption>Choices of a layer. The last column says how many equally used experts would be as uneven.</caption>
<thead><tr><th>layer</th><th>busiest expert</th><th>its share, %</th><th>never chosen</th><th>as many as</th></tr></thead><tbody>
{% for row in heat.rows %}<tr><td>{{ row.layer }}</td><td>{{ row.busiest }}</td><td>{{ "%.1f"|format(100 * row.share) }}</td>
<td>{{ row.unused }}</td><td>{{ "%.1f"|format(row.as_many_as) }}</td></tr>
{% endfor %}</tbody></table></div>
</body></html>
"""


Parts = Sequence[tuple[str, Sequence[Mapping[str, Any]]]]


def write_misses(path: str | Path, facts: Mapping[str, Any], parts: Parts, shares: Shares) -> None:
    """Write the page, at once or not at all.

    facts: model, tokens, k, experts, layers. parts: (title, rows), each row {"policy", "slots", "hit_rate", "loads_per_token", "bound"}.
    shares: of the heat map.
    Raises UsageError where there is nothing to draw or a library is missing.
    """
    chart.libraries()
    if not parts or not all(rows for _, rows in parts):
        raise UsageError("there are no miss curves to draw", "give at least one policy and one size")
    write_atomic(Path(path), render(facts, parts, shares).encode())


def render(facts: Mapping[str, Any], parts: Parts, shares: Shares) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    found = [
        {
            "title": title,
            # ours, with every text in it escaped by the renderer
            "wide": Markup(chart.svg(draw(rows, chart.WIDE - 60))),  # noqa: S704
            "narrow": Markup(chart.svg(draw(rows, chart.NARROW))),  # noqa: S704
            "sizes": sorted({row["slots"] for row in rows}),
            "rows": _by_policy(rows),
        }
        for title, rows in parts
    ]
    heat = {
        "wide": Markup(chart.svg(draw_heat(shares, chart.WIDE - 60))),  # noqa: S704
        "narrow": Markup(chart.svg(draw_heat(shares, chart.NARROW))),  # noqa: S704
        "rows": by_layer(shares),
    }
    page = environment.from_string(TEMPLATE)
    return page.render(facts=facts, parts=found, heat=heat)


def _by_policy(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One table row per policy, the best at the smallest size first; bounds on top."""
    names = dict.fromkeys(row["policy"] for row in rows)
    found = []
    for name in names:
        mine = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["slots"])
        found.append({"policy": name, "bound": mine[0]["bound"], "rates": [row["hit_rate"] for row in mine]})
    return sorted(found, key=lambda row: (not row["bound"], -sum(row["rates"])))


def draw(rows: Sequence[Mapping[str, Any]], width: int) -> Any:
    """Misses per token (log) against slots per layer, one line per policy; bounds dashed."""
    alt = chart.libraries()
    data = [dict(row) for row in rows if row["loads_per_token"] > 0]
    names = [row["policy"] for row in _by_policy(rows)]
    misses = [row["loads_per_token"] for row in data] or [1.0]
    legend = alt.Legend(title=None, labelFontSize=13) if width > 500 else alt.Legend(title=None, orient="bottom", columns=3)
    base = alt.Chart(alt.Data(values=data)).encode(
        x=alt.X("slots:Q", title="slots per layer").axis(tickMinStep=1),
        y=alt.Y("loads_per_token:Q", title="misses per token, log scale").scale(
            type="log", domain=[min(misses) / 1.1, max(misses) * 1.1], nice=False
        ),
        color=alt.Color("policy:N", sort=names, legend=legend).scale(scheme="tableau20"),
        strokeDash=alt.StrokeDash("bound:N", legend=None).scale(domain=[False, True], range=[[1, 0], [6, 4]]),
    )
    return (
        (base.mark_line(strokeWidth=2) + base.mark_point(filled=True, size=30))
        .properties(width=width, height=380, background="white")
        .configure_axis(**chart.AXIS)
        .configure_view(strokeWidth=0)
    )
