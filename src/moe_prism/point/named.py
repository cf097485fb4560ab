"""Operating points with names: one in its own file, many in `frontier.json`. Files of version 0.1 are upgraded where they can be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..catalogue import methods
from ..errors import CorruptError, UsageError
from ..files import replace_file
from ..registry import choices
from . import read
from .base import OperatingPoint, RoutingStage, SlotRule, own_scorer, slots_unit

KIND = "operating point"
OLD_KIND = "skip plan"
FRONTIER = "frontier.json"
RENAMED = {"weight-level": "weight-cutoff", "level": "cutoff"}
"""Stages and parameters that version 0.1 called otherwise."""


@dataclass(frozen=True, kw_only=True)
class NamedPoint:
    """A point, what people call it, and how and on what it was made (plain JSON: method, text, measured quality)."""

    name: str
    point: OperatingPoint
    made: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"kind": KIND, "name": self.name, "point": self.point.to_json(), "made": dict(self.made)}

    @classmethod
    def from_json(cls, data: object, name: str) -> NamedPoint:
        """Also takes a bare operating point, and a skip plan of version 0.1; name: for one that has none."""
        row = read.mapping(data, KIND)
        if "point" in row:
            made = read.mapping(row.get("made", {}), f"made of an {KIND}")
            read.check_plain(made, "made")
            return cls(name=read.text(row, "name", KIND, name), point=OperatingPoint.from_json(row["point"]), made=made)
        if "schema" in row:
            return cls(name=name, point=OperatingPoint.from_json(row))
        return _skip_plan(row, name)


def write_point(path: str | Path, point: NamedPoint) -> None:
    """Write a point's file at once or not at all. UsageError where it cannot be written."""
    data = (json.dumps(point.to_json(), indent=2, allow_nan=False) + "\n").encode()
    try:
        replace_file(Path(path), data)
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


def point_within(bytes_per_token: float, folder: str | Path) -> NamedPoint:
    """Of the folder's `frontier.json` the point with the least KL that reads no more. UsageError where none does, with the least."""
    path = Path(folder) / FRONTIER
    if not path.is_file():
        raise UsageError(f"there is no {path}", "measure points with `moe-prism frontier`")
    rows, points = _rows_in(path), {point.name: point for point in _points_in(path)}
    known = [
        (
            read.number(read.get(row, "active_expert_bytes", "point"), "bytes"),
            read.number(read.get(row, "kl", "point"), "kl"),
            name,
        )
        for row in rows
        if (name := read.text(row, "name", "point")) in points
    ]
    fits = [(kl, size, name) for size, kl, name in known if size <= bytes_per_token]
    if not fits:
        least = min(known, default=(0.0, 0.0, "none"))
        raise UsageError(
            f"no measured point reads {bytes_per_token:g} bytes per token or less; '{least[2]}' reads {least[0]:.0f}",
            "give more, or measure cheaper points with `moe-prism frontier --methods bits`",
        )
    return points[min(fits)[2]]


def _rows_in(path: Path) -> list[dict[str, Any]]:
    """The entries of a frontier, baselines included."""
    data = _load(path)
    if not isinstance(data, dict) or not isinstance(data.get("points"), list):
        raise CorruptError(f"{path} is no frontier", "measure it again with `moe-prism frontier`")
    every = [*data["points"], *(data.get("baseline_topk") or []), *(data.get("baseline_bits") or [])]
    return [read.mapping(row, f"points of {path.name}") for row in every]


def _points_in(path: Path) -> list[NamedPoint]:
    """All points of a file that can be run: none of a frontier whose version did not say how its points do."""
    data = _load(path)
    if not isinstance(data, dict) or not isinstance(data.get("points"), list):
        return [NamedPoint.from_json(data, path.stem)]
    named = [(read.text(row, "name", "point"), _measured(row)) for row in _rows_in(path)]
    return [NamedPoint(name=name, point=point) for name, point in named if point is not None]


def _measured(row: dict[str, Any]) -> OperatingPoint | None:
    """The point of an entry of `frontier.json`."""
    if row.get("point") is not None:
        return OperatingPoint.from_json(row["point"])
    return upgraded(read.text(row, "rule", "point"), read.number(read.get(row, "budget", "point"), "budget of a point"))


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", "make one with `moe-prism skip` or `moe-prism frontier`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}", read.REMAKE) from error


def _skip_plan(row: dict[str, Any], name: str) -> NamedPoint:
    """`plan.json` of version 0.1, or the bare mapping {layer: n}."""
    if row.get("kind", OLD_KIND) != OLD_KIND:
        raise CorruptError(f"a file of kind {row['kind']!r} is no {KIND}", read.REMAKE)
    if "layers" not in row:
        return NamedPoint(name=name, point=OperatingPoint(routing=(RoutingStage(layers=_counts(row)),)))
    parameters = read.mapping(row.get("parameters", {}), f"parameters of a {OLD_KIND}")
    made = dict(read.mapping(row.get("made", {}), f"made of a {OLD_KIND}"))
    if row.get("mean") is not None:
        made["mean"] = read.number(row["mean"], f"mean of a {OLD_KIND}")
    name_then = read.text(row, "policy", OLD_KIND, "top-n")
    stage = RoutingStage(
        stage=RENAMED.get(name_then, name_then),
        layers=_counts(read.mapping(row["layers"], f"layers of a {OLD_KIND}")),
        parameters={
            RENAMED.get(key, key): read.rows(value, f"parameter '{key}' of a {OLD_KIND}") for key, value in parameters.items()
        },
        keep_mass=read.flag(row.get("keep_mass"), f"keep_mass of a {OLD_KIND}"),
    )
    return NamedPoint(name=name, point=OperatingPoint(routing=(stage,)), made=made)


def _counts(layers: Mapping[str, Any]) -> tuple[int, ...]:
    """n per layer from {"0": n, "1": n, ...}, every layer once."""
    names = [str(i) for i in range(len(layers))]
    if not layers or set(layers) != set(names):
        raise CorruptError(f"'layers' of a {OLD_KIND} must name the MoE layers 0, 1, ... one by one", read.REMAKE)
    return read.whole_numbers([layers[name] for name in names], f"layers of a {OLD_KIND}")
