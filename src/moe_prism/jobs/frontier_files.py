"""The files of a measured frontier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import changing
from ..checkpoint.manifest import MANIFEST
from ..frontier import Frontier


def write_frontier(result: Frontier, out: str | Path, *, samples: Mapping[str, Any] | None = None) -> None:
    """frontier.json, report.html and frontier.png in a folder: all of them, or nothing where it is a model's.

    samples: what else the report shows, as `moe_prism.run_demo` has it. Needs the extra `report`.

    >>> import moe_prism
    >>> asked = moe_prism.FrontierOptions(methods=("uniform",), tokens=256, length=128, calibration_tokens=256)
    >>> moe_prism.write_frontier(moe_prism.measure_frontier("nano", asked), "chart")
    >>> moe_prism.Frontier.load("chart/frontier.json").n_sub
    1
    """
    target = Path(out)
    if not (target / MANIFEST).is_file():
        return _write(result, target, samples)
    with changing(target) as change:
        _write(result, change.work, samples)
        change.commit({})
    return None


def keep_frontier(result: Frontier, folder: str | Path) -> None:
    """The same in the measured model's own folder, whose prism.json then lists the Pareto points.

    >>> import moe_prism
    >>> found = moe_prism.measure_frontier("elastic", moe_prism.FrontierOptions(tokens=256, length=128))
    >>> moe_prism.keep_frontier(found, "elastic")
    >>> len(moe_prism.verify("elastic")) > 2
    True
    """
    with changing(Path(folder)) as change:
        _write(result, change.work, None)
        change.commit({"operating_points": [p.to_json() for p in result.points if p.pareto]})


def _write(result: Frontier, target: Path, samples: Mapping[str, Any] | None) -> None:
    from ..report import write_png, write_report

    target.mkdir(parents=True, exist_ok=True)
    result.save(target / "frontier.json")
    write_report(result, target / "report.html", dict(samples or {}))
    write_png(result, target / "frontier.png")
