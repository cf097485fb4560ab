"""The files of a measured frontier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import changing, read_manifest
from ..checkpoint.manifest import MANIFEST, PLAIN_KINDS
from ..frontier import Frontier
from ..frontier.evaluation import FILE, Evaluation
from ..point.named import FRONTIER


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
        _write(result, change.work, samples, target)
        change.commit({})
    return None


def keep_frontier(result: Frontier, folder: str | Path) -> None:
    """The same in the measured model's own folder. The prism.json of an elastic one then lists the Pareto points.

    >>> import moe_prism
    >>> found = moe_prism.measure_frontier("elastic", moe_prism.FrontierOptions(tokens=256, length=128))
    >>> moe_prism.keep_frontier(found, "elastic")
    >>> len(moe_prism.verify("elastic")) > 2
    True
    """
    with changing(Path(folder)) as change:
        _write(result, change.work, None, Path(folder))
        is_elastic = read_manifest(folder).get("kind") not in PLAIN_KINDS
        change.commit({"operating_points": [p.to_json() for p in result.points if p.pareto]} if is_elastic else {})


def add_tasks(folder: str | Path) -> bool:
    """Write the report of a folder's frontier again, with the tasks of its eval.json; False where it has no frontier.

    >>> import moe_prism
    >>> moe_prism.add_tasks("elastic")
    False
    """
    target = Path(folder)
    if not (target / FRONTIER).is_file():
        return False
    write_frontier(Frontier.load(target / FRONTIER), target)
    return True


def _write(result: Frontier, target: Path, samples: Mapping[str, Any] | None, home: Path | None = None) -> None:
    """home: the folder that `target` will be part of, whose tasks belong into the report."""
    from ..report import write_png, write_report

    target.mkdir(parents=True, exist_ok=True)
    tasks = (home or target) / FILE
    more = {"evaluation": Evaluation.load(tasks)} if tasks.is_file() else {}
    result.save(target / FRONTIER)
    write_report(result, target / "report.html", {**(samples or {}), **more})
    write_png(result, target / "frontier.png")
