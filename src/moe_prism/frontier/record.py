"""The one record of a measured frontier: the command line, the report and `frontier.json` all read it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UsageError
from ..files import replace_file
from ..point import OperatingPoint
from ..point.named import upgraded

REMEASURE = "write it again with `moe-prism frontier`"


@dataclass(frozen=True)
class DecodeTime:
    """Milliseconds per token while `batch` sequences decode together, of one step after another on one machine."""

    batch: int
    ms_per_token: float
    """Median over the turns."""
    low: float
    """Lower quartile of the turns; `high` is the upper one."""
    high: float
    of_stock: float
    """Median over the turns of this time / the time of the model without us at all its experts, in the same turn."""
    turns: int

    @classmethod
    def from_json(cls, data: object, where: str = "time") -> DecodeTime:
        mapping = _mapping(data, where)
        return cls(**{f.name: _read(mapping, f.name, str(f.type), where) for f in fields(cls)})


@dataclass(frozen=True)
class DomainQuality:
    """What `MeasuredPoint` says of all held-out text, of one domain of it."""

    ppl: float
    kl: float
    top1_agreement: float

    @classmethod
    def from_json(cls, data: object, where: str = "domain") -> DomainQuality:
        mapping = _mapping(data, where)
        return cls(**{f.name: _read(mapping, f.name, str(f.type), where) for f in fields(cls)})


@dataclass(frozen=True)
class MeasuredPoint:
    """One operating point: what it costs per token and how far it is from the source model on held-out text."""

    name: str
    """Short, unique within the frontier and shown to people, e.g. "product-8" or "top-2"."""
    rule: str
    """How slots are chosen: "product", "pattern", ...; "topk" for the plain model with fewer experts."""
    budget: float
    """What the point asks for, 0..1 (its `of` says of what); of a pruned model at most the share of the experts that is left."""
    k_slots: float
    """Mean kept slots per token and layer; a whole number unless the rule is continuous."""
    ppl: float
    """Perplexity per token."""
    kl: float
    """Mean KL divergence from the source model, nats per token."""
    top1_agreement: float
    """Share (0..1) of tokens whose most likely successor is the source model's."""
    active_expert_params: float
    """Expert parameters used per token, all layers."""
    active_expert_bytes: float
    """Expert bytes read per token, all layers."""
    flops_per_token: float
    """FLOPs of the expert part per token, two per multiply-add."""
    pareto: bool
    """No measured point is both cheaper and closer."""
    resident_expert_bytes: float = 0.0
    """Expert bytes in memory, all layers: what pruning saves. 0 where it was not recorded (older files)."""
    distinct_expert_bytes: float = 0.0
    """Expert bytes read per forward of the measurement, what several tokens read counted once. 0 where it was not recorded."""
    point: OperatingPoint | None = None
    """What was measured, ready to run again; None where a version before 0.2 wrote it and it cannot be told from the rest."""
    time: DecodeTime | None = None
    """How long decoding took on the machine that `provenance` names; None where nobody asked, or where weights are changed in place."""
    domains: Mapping[str, DomainQuality] = field(default_factory=dict)
    """By domain, where the evaluation text has any (`--domain`)."""

    @property
    def worst_domain(self) -> str | None:
        """The domain with the largest KL."""
        return max(self.domains, key=lambda name: self.domains[name].kl, default=None)

    @classmethod
    def from_json(cls, data: object, where: str = "point") -> MeasuredPoint:
        """Check and convert one entry of `points`; `where` names it in the error."""
        mapping = _mapping(data, where)
        plain = [
            f for f in fields(cls) if f.name not in ("point", "time", "domains") and (f.name in mapping or f.default is MISSING)
        ]
        row = {f.name: _read(mapping, f.name, str(f.type), where) for f in plain}
        stored, time = mapping.get("point"), mapping.get("time")
        return cls(
            **row,
            point=upgraded(row["rule"], row["budget"]) if stored is None else OperatingPoint.from_json(stored),
            time=None if time is None else DecodeTime.from_json(time, f"time of {where}"),
            domains={
                name: DomainQuality.from_json(quality, f"domain '{name}' of {where}")
                for name, quality in _mapping(mapping.get("domains", {}), f"domains of {where}").items()
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, the operating point in its own form, and the time where it was measured."""
        row = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "point": self.point and self.point.to_json(),
            "time": self.time and asdict(self.time),
            "domains": {name: asdict(quality) for name, quality in self.domains.items()},
        }
        return {name: value for name, value in row.items() if value or name not in ("time", "domains")}


@dataclass(frozen=True)
class Frontier:
    """All points of one model and what they are compared with: plain top-k, and plain rounding to fewer bits."""

    model: str
    source: str
    n_sub: int
    points: tuple[MeasuredPoint, ...]
    baseline_topk: tuple[MeasuredPoint, ...] = ()
    baseline_bits: tuple[MeasuredPoint, ...] = ()
    """The whole model in int8 and int4; none where the source is stored so, or where an older version measured."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def every(self) -> tuple[MeasuredPoint, ...]:
        """All that was measured."""
        return (*self.points, *self.baseline_topk, *self.baseline_bits)

    def to_json(self) -> dict[str, Any]:
        """The content of `frontier.json` as plain dicts, lists and numbers."""
        return {
            "model": self.model,
            "source": self.source,
            "n_sub": self.n_sub,
            "points": [p.to_json() for p in self.points],
            "baseline_topk": [p.to_json() for p in self.baseline_topk],
            "baseline_bits": [p.to_json() for p in self.baseline_bits],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: object) -> Frontier:
        """The inverse of `to_json`. A missing key, a wrong type or a number that is not finite is a CorruptError."""
        mapping = _mapping(data, "frontier")
        provenance = _mapping(_get(mapping, "provenance", "frontier"), "provenance")
        _check_plain(provenance, "provenance")
        return cls(
            model=_read(mapping, "model", "str", "frontier"),
            source=_read(mapping, "source", "str", "frontier"),
            n_sub=_read(mapping, "n_sub", "int", "frontier"),
            points=_points(mapping, "points"),
            baseline_topk=_points(mapping, "baseline_topk"),
            baseline_bits=_points(mapping, "baseline_bits") if "baseline_bits" in mapping else (),
            provenance=provenance,
        )

    def save(self, path: str | Path) -> None:
        """Write `frontier.json` at once or not at all; the same frontier gives the same bytes."""
        data = Frontier.from_json(self.to_json()).to_json()  # nothing is written that could not be read back
        write_atomic(path, (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read what `save` wrote."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}", "give the path of a frontier.json") from error
        except ValueError as error:
            raise CorruptError(f"{path} is not JSON: {error}", REMEASURE) from error
        return cls.from_json(data)


def write_atomic(path: str | Path, data: bytes) -> None:
    """`replace_file` for a path a person gave: UsageError if it cannot be written."""
    try:
        replace_file(Path(path), data)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose a path in an existing, writable folder") from error


def _points(mapping: Mapping[str, Any], key: str) -> tuple[MeasuredPoint, ...]:
    rows = _get(mapping, key, "frontier")
    if not isinstance(rows, list):
        raise CorruptError(f"key '{key}' of frontier must be a list, not {type(rows).__name__}", REMEASURE)
    return tuple(MeasuredPoint.from_json(row, f"{key}[{i}]") for i, row in enumerate(rows))


def _mapping(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise CorruptError(f"{where} must be an object with keys, not {type(data).__name__}", REMEASURE)
    return data


def _get(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in mapping:
        raise CorruptError(f"key '{key}' of {where} is missing", REMEASURE)
    return mapping[key]


_ACCEPTED: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


def _read(mapping: Mapping[str, Any], key: str, kind: str, where: str) -> Any:
    value = _get(mapping, key, where)
    if not _is_kind(value, kind):
        raise CorruptError(f"key '{key}' of {where} must be {kind}, not {type(value).__name__}", REMEASURE)
    if kind != "float":
        return value
    return _finite(value, f"key '{key}' of {where}")


def _is_kind(value: object, kind: str) -> bool:
    # bool is a subclass of int, and `"ppl": true` is no number
    return isinstance(value, _ACCEPTED[kind]) and (kind == "bool" or not isinstance(value, bool))


def _finite(value: float, what: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise CorruptError(f"{what} is not a finite number", REMEASURE)
    return number


def _check_plain(value: object, where: str) -> None:
    """Provenance is free in form, but has to survive a trip through JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CorruptError(f"key {key!r} of {where} must be str", REMEASURE)
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif isinstance(value, float):
        _finite(value, f"key '{where}'")
    elif not isinstance(value, str | int | None):
        raise CorruptError(f"key '{where}' must be plain JSON, not {type(value).__name__}", REMEASURE)
