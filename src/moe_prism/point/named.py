"""Operating points with names: one in its own file, many in `frontier.json`. Files of version 0.1 are upgraded where they can be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..catalogue import methods
from ..errors import CorruptError, UsageError
from ..files import replace_file
from ..registry import choices
from ..result import Result
from ..schema import check, read_json
from ..schema.points import REMAKE, FrontierForm, MeasuredForm, NamedForm, PointForm, SkipPlanForm, StageForm
from .base import OperatingPoint, RoutingStage, SlotRule, own_scorer, slots_unit

KIND = "operating point"
FRONTIER = "frontier.json"
RENAMED = {"weight-level": "weight-cutoff", "level": "cutoff"}
"""Stages and parameters that version 0.1 called otherwise."""


@dataclass(frozen=True, kw_only=True)
class NamedPoint(Result):
    """A point, what people call it, and how and on what it was made (plain JSON: method, text, measured quality)."""

    name: str
    point: OperatingPoint
    made: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"kind": KIND, "name": self.name, "point": self.point.to_json(), "made": dict(self.made)}

    def to_records(self) -> list[dict[str, Any]]:
        """Of a skip plan a row per layer, with its experts per token; of another point its name alone."""
        plans = [stage.layers for stage in self.point.routing]
        return [{"layer": i, "experts": n} for i, n in enumerate(plans[-1])] if plans else [{"name": self.name}]

    def encoded(self) -> bytes:
        """The bytes of its file."""
        return (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: object, name: str) -> NamedPoint:
        """Also takes a bare operating point, and a skip plan of version 0.1; name: for one that has none."""
        return cls._of(data, name, KIND)

    @classmethod
    def _of(cls, data: object, name: str, where: str) -> NamedPoint:
        given = data if isinstance(data, dict) else {}
        if "schema" in given or "point" in given or not isinstance(data, dict):
            if "schema" in given:
                return cls(name=name, point=OperatingPoint.of_form(check(PointForm, data, where, REMAKE)))
            form = check(NamedForm, data, where, REMAKE)
            return cls(name=form.name or name, point=OperatingPoint.of_form(form.point), made=form.made)
        wrapped = data if "layers" in given or "kind" in given else {"layers": data}  # or the bare mapping {layer: n}
        return _skip_plan(check(SkipPlanForm, wrapped, where, REMAKE), name, where)


def write_point(path: str | Path, point: NamedPoint) -> None:
    """Write a point's file at once or not at all. UsageError where it cannot be written."""
    try:
        replace_file(Path(path), point.encoded())
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose a path in an existing, writable folder") from error


def read_points(path: str | Path) -> list[NamedPoint]:
    """All points of a file: a point's own, or a `frontier.json`. UsageError if there is none, CorruptError naming what is wrong."""
    found = _points_in(Path(path))
    if not found:
        raise UsageError(
            f"{path} was written by a version whose points cannot be run", "measure it again with `moe-prism frontier`"
        )
    return found


def upgraded(rule: str, budget: float) -> OperatingPoint | None:
    """What version 0.1 measured under the name of a selection rule, or as plain top-k; None where that does not say how it ran."""
    own = "whole-experts" if rule == "topk" else methods.own_name(rule)
    if own not in methods.names("slots") or not 0 < budget <= 1:
        return None
    kept = SlotRule(
        budget=budget, rule=own, scorer=own_scorer(own), compensate=rule != "topk", of=slots_unit(own), control="none"
    )
    return OperatingPoint(slots=kept)


def find_point(asked: str, folder: str | Path | None = None) -> NamedPoint:
    """The point of a name in the folder's `frontier.json`, or of a file. UsageError for neither, naming the nearest."""
    measured = None if folder is None else Path(folder) / FRONTIER
    known = _points_in(measured) if measured is not None and measured.is_file() else []
    for point in known:
        if point.name == asked:
            return point
    path = Path(asked)
    if path.is_file():
        found = read_points(path)
        if len(found) != 1:
            raise UsageError(f"{asked} holds {len(found)} operating points", "name one of them, or give a file of one")
        return found[0]
    if path.suffix == ".json" or not known:
        raise UsageError(
            f"'{asked}' is no file and no operating point of {measured or 'a folder'}", "measure some with `moe-prism frontier`"
        )
    raise UsageError(f"no operating point '{asked}'", choices(asked, [point.name for point in known]))


def source_of(folder: Path, asked: Sequence[str]) -> Path:
    """The frontier that points to serve are in: a file that is asked for, or the folder's own. UsageError where it has not all of them."""
    files = [Path(name) for name in asked if name.endswith(".json")]
    if len(files) > 1 or (files and len(asked) > 1):
        raise UsageError("points were asked for by file and by name", "give one frontier.json, or names of the folder's points")
    source = files[0] if files else folder / FRONTIER
    if not source.is_file():
        raise UsageError(f"there is no {source}", "measure points with `moe-prism frontier`")
    form = check(FrontierForm, read_json(source, REMAKE), str(source), REMAKE)
    known = dict.fromkeys(row.name for row in (*form.points, *form.baseline_topk, *form.baseline_bits))
    for name in () if files else asked:
        if name not in known:
            raise UsageError(f"no operating point '{name}' in {source.name}", choices(name, known))
    return source


def name_within(bytes_per_token: float, folder: str | Path, *, per_token: bool = False) -> str:
    """The name of the point in the folder's `frontier.json` with the least KL that reads no more. UsageError where none does.

    per_token: only of those that can share a batch.
    """
    path = Path(folder) / FRONTIER
    if not path.is_file():
        raise UsageError(f"there is no {path}", "measure points with `moe-prism frontier`")
    form = check(FrontierForm, read_json(path, REMAKE), str(path), REMAKE)
    every = [(row, measured_point(row)) for row in (*form.points, *form.baseline_topk, *form.baseline_bits)]
    rows = [row for row, point in every if point is not None and (point.is_per_token or not per_token)]
    fits = [row for row in rows if row.active_expert_bytes <= bytes_per_token]
    if not fits:
        least = min((row.active_expert_bytes for row in rows), default=0.0)
        raise UsageError(
            f"no measured point reads {bytes_per_token:g} bytes per token or less, the cheapest reads {least:.0f}",
            "give more, or measure cheaper points with `moe-prism frontier --methods bits`",
        )
    return min(fits, key=lambda row: row.kl).name


def _points_in(path: Path) -> list[NamedPoint]:
    """All points of a file that can be run: none of a frontier whose version did not say how its points do."""
    data = read_json(path, REMAKE)
    if not isinstance(data, dict) or "points" not in data:
        return [NamedPoint._of(data, path.stem, str(path))]
    form = check(FrontierForm, data, str(path), REMAKE)
    named = [(row.name, measured_point(row)) for row in [*form.points, *form.baseline_topk, *form.baseline_bits]]
    return [NamedPoint(name=name, point=point) for name, point in named if point is not None]


def measured_point(row: MeasuredForm) -> OperatingPoint | None:
    """The point of an entry of `frontier.json`."""
    return upgraded(row.rule, row.budget) if row.point is None else OperatingPoint.of_form(row.point)


def _skip_plan(form: SkipPlanForm, name: str, where: str) -> NamedPoint:
    """`plan.json` of version 0.1."""
    if set(form.layers) != {str(i) for i in range(len(form.layers))}:
        raise CorruptError(f"{where}: 'layers' must name the MoE layers 0, 1, ... one by one", REMAKE)
    parameters = {RENAMED.get(key, key): rows for key, rows in form.parameters.items()}
    stage = StageForm(
        stage=RENAMED.get(form.policy, form.policy),
        layers=[form.layers[str(i)] for i in range(len(form.layers))],
        parameters=parameters,
        keep_mass=form.keep_mass,
    )
    made = {**form.made, **({} if form.mean is None else {"mean": float(form.mean)})}
    return NamedPoint(name=name, point=OperatingPoint(routing=(RoutingStage.of_form(stage),)), made=made)
