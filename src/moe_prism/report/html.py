"""One offline page about a frontier: summary, charts, every number as a table, where it all comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..frontier.evaluation import score_rows
from ..frontier.record import Frontier, MeasuredPoint, write_atomic
from . import chart
from .summary import (
    KEPT,
    Duel,
    distinct,
    duels,
    full_bytes,
    is_timed,
    judged_points,
    kl,
    main_points,
    main_rule,
    percent,
    perplexity,
    plain_points,
    sentences,
    slice_names,
)

EXTRA = {"samples": ("budget", "prompt", "text", "tokens_per_s"), "notes": (), "evaluation": ()}


def write_report(frontier: Frontier, path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write the page to `path`, at once or not at all.

    extra: "samples", a list of {"budget" (0..1), "prompt", "text", "tokens_per_s"}, "notes", a list of sentences, and
    "evaluation", an `Evaluation` of tasks.
    """
    _check_ready(frontier)
    write_atomic(path, render(frontier, extra).encode())


def write_png(frontier: Frontier, path: str | Path) -> None:
    """Write the KL chart of the page as a PNG, twice the size, for a README."""
    _check_ready(frontier)
    write_atomic(path, chart.png(chart.kl_chart(frontier)))


def render(frontier: Frontier, extra: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    added = _checked(extra or {})
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, kl=kl, perplexity=perplexity, hundredths=lambda share: f"{100 * share:.1f}")
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        frontier=frontier,
        sentences=sentences(frontier),
        texts=texts(frontier),
        tiles=tiles(frontier),
        figures=_figures(frontier),
        columns=_columns(frontier.every),
        full=full_bytes(frontier),
        timed=is_timed(frontier),
        domains=domain_names(frontier),
        sliced=sorted((p for p in frontier.every if p.domains), key=lambda p: -p.active_expert_bytes),
        slices=slice_names(frontier),
        judged=sorted(judged_points(frontier), key=lambda p: -p.active_expert_bytes),
        least=KEPT,
        script=Markup(files(__package__).joinpath("report.js").read_text(encoding="utf-8")),  # noqa: S704 - ours
        points=sorted(frontier.points, key=lambda p: (p.rule != main_rule(frontier), p.rule, -p.active_expert_bytes)),
        duels=[*duels(frontier), *duels(frontier, frontier.baseline_bits)],
        provenance=_flat(frontier.provenance),
        samples=_grouped(added.get("samples", [])),
        notes=added.get("notes", []),
        tasks=added.get("evaluation"),
        score_rows=score_rows,
        data=_script_json(frontier.to_json()),
    )


def texts(frontier: Frontier) -> list[str]:
    """What it was calibrated and judged on, for the head of the page; nothing of a file that does not say."""
    from ..data.bundled import KINDS  # whose package loads torch

    said = []
    for what, key in (("Calibrated on", "calibration"), ("Judged on", "evaluation")):
        facts = frontier.provenance.get(key) or {}
        if "text" in facts:
            name = str(facts["text"])
            kind = f" ({KINDS[name]})" if name in KINDS else ""
            said.append(
                f"{what} {name}{kind}" + (f", {facts['tokens']:,} tokens" if isinstance(facts.get("tokens"), int) else "")
            )
    return said


def domain_names(frontier: Frontier) -> list[str]:
    """Of the evaluation text, in the order in which they were named; none where it has none."""
    return list(dict.fromkeys(name for point in frontier.every for name in point.domains))


def tiles(frontier: Frontier) -> list[tuple[str, str]]:
    """The headline figures: (value, what it is)."""
    found = [(str(distinct(main_points(frontier))), f"distinct operating points, rule {main_rule(frontier)}")]
    if frontier.baseline_topk:
        found.append((str(distinct(plain_points(frontier))), "with plain top-k, full model included"))
    return [
        *found,
        *[_duel_tile(d, full_bytes(frontier)) for d in duels(frontier) if d.best and min(d.best.kl, d.plain.kl) > 0][:3],
    ]


def _duel_tile(duel: Duel, full: float) -> tuple[str, str]:
    assert duel.best is not None
    ratio = duel.plain.kl / duel.best.kl
    value = f"{ratio:.1f}\u00a0\u00d7 less" if ratio >= 1 else f"{1 / ratio:.1f}\u00a0\u00d7 more"
    return value, f"drift (KL) than plain {duel.plain.name}, at {percent(duel.plain.active_expert_bytes / full)} of the bytes"


def _figures(frontier: Frontier) -> list[dict[str, Any]]:
    from markupsafe import Markup

    price = "expert weights read per token"
    drawings = [
        (chart.KL_TITLE, f"KL to the full model against {price}", chart.kl_chart),
        (chart.PPL_TITLE, f"perplexity against {price}", chart.ppl_chart),
    ]
    if is_timed(frontier):
        drawings.insert(1, (chart.TIME_TITLE, "KL to the full model against milliseconds per token", chart.time_chart))
    return [
        {
            "alt": f"{title}: {what}. {' '.join(sentences(frontier)[1:3])}",
            # ours, with every text in it escaped by the renderer
            "wide": Markup(chart.svg(draw(frontier, chart.WIDE))),  # noqa: S704
            "narrow": Markup(chart.svg(draw(frontier, chart.NARROW))),  # noqa: S704
        }
        for title, what, draw in drawings
    ]


def _columns(points: Sequence[MeasuredPoint]) -> list[dict[str, Any]]:
    """The cost columns with one unit each, so that a column can be read down."""
    wanted = (("active_expert_bytes", "Expert bytes", "B"), ("active_expert_params", "Expert parameters", ""))
    columns = []
    resident = [("resident_expert_bytes", "Resident experts", "B")] if any(p.resident_expert_bytes for p in points) else []
    sends = [("sends", "Sends", "")] if any(p.sends for p in points) else []
    for key, title, unit in (*wanted, ("flops_per_token", "FLOPs", ""), *sends, *resident):
        top = max((getattr(p, key) for p in points), default=0.0)
        size, prefix = next((s for s in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if top >= s[0]), (1.0, ""))
        unit = prefix + unit if key.startswith("resident") else f"{prefix}{unit} per token".lstrip()
        columns.append({"key": key, "title": title, "unit": unit, "size": size})
    return columns


def _check_ready(frontier: Frontier) -> None:
    chart.libraries()
    if not frontier.points:
        raise UsageError("the frontier has no operating points", "measure some with `moe-prism frontier`")


def _checked(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(set(extra) - set(EXTRA))
    if unknown:
        raise UsageError(f"the report has no section '{unknown[0]}'", f"choose from: {', '.join(EXTRA)}")
    for i, sample in enumerate(extra.get("samples", [])):
        missing = [key for key in EXTRA["samples"] if key not in sample]
        if missing:
            raise UsageError(f"samples[{i}] has no '{missing[0]}'", f"give each sample: {', '.join(EXTRA['samples'])}")
    return extra


def _grouped(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    prompts: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        prompts.setdefault(sample["prompt"], []).append(sample)
    return list(prompts.items())


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as dotted names and readable values."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            rows += _flat(item, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)))
    return rows


def _script_json(data: Mapping[str, Any]) -> Any:
    """JSON that cannot end its <script> element: every character HTML could react to is written as a JSON escape."""
    from markupsafe import Markup

    text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False)  # ASCII only, so U+2028 is escaped already
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704
