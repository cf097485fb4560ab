"""The one record of a measured frontier: the command line, the report and `frontier.json` all read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import replace_file
from ..point import OperatingPoint
from ..point.named import measured_point
from ..result import Result
from ..schema import check, read_form
from ..schema.points import FrontierForm, MeasuredForm

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


@dataclass(frozen=True)
class DomainQuality:
    """What `MeasuredPoint` says of all held-out text, of one domain of it."""

    ppl: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class SliceScore:
    """What one slice of the judge says of a point. Shares are 0..1 and of questions; of `routing` they are means over tokens.

    >>> from moe_prism.frontier import SliceScore
    >>> SliceScore(kept=0.8, stderr=0.02, right=0.4, full=0.45, flips=0.11, items=400).items
    400
    """

    kept: float
    """Of the questions that the full model gets right, the share that the point gets right: 1 for the model itself."""
    stderr: float
    """Standard error of `kept`. Questions from one window of text count as drawn together."""
    right: float
    """Share of all questions that the point gets right."""
    full: float
    """The same of the full model."""
    flips: float
    """Share of all questions on which the two differ, either way; of `routing` the tokens with any other expert in any layer."""
    items: int
    """Questions."""
    is_ability: bool = True
    """Whether right and wrong are about the world. Of `continuation` and `routing` they are about being the same as the full model."""


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
    sends: float = 0.0
    """Devices that compute something for a token, per layer: vectors that expert parallelism sends there, and back. Every expert is on a
    device of its own unless `devices` of the provenance's options says how many there are. 0 where it was not recorded."""
    point: OperatingPoint | None = None
    """What was measured, ready to run again; None where a version before 0.2 wrote it and it cannot be told from the rest."""
    time: DecodeTime | None = None
    """How long decoding took on the machine that `provenance` names; None where nobody asked, or where weights are changed in place."""
    domains: Mapping[str, DomainQuality] = field(default_factory=dict)
    """By domain, where the evaluation text has any (`--domain`)."""
    slices: Mapping[str, SliceScore] = field(default_factory=dict)
    """By slice of the judge, where it was asked (`--judge`)."""

    @property
    def worst_slice(self) -> str | None:
        """The slice of which the point keeps least, of those that are abilities where any is; the first asked of equal ones."""
        abilities = [name for name, found in self.slices.items() if found.is_ability]
        return min(abilities or self.slices, key=lambda name: self.slices[name].kept, default=None)

    @property
    def worst_domain(self) -> str | None:
        """The domain with the largest KL."""
        return max(self.domains, key=lambda name: self.domains[name].kl, default=None)

    @classmethod
    def from_json(cls, data: object, where: str = "point") -> MeasuredPoint:
        """Check and convert one entry of `points`; `where` names it in the error."""
        return cls.of_form(check(MeasuredForm, data, where, REMEASURE))

    @classmethod
    def of_form(cls, form: MeasuredForm) -> MeasuredPoint:
        """What a checked file says."""
        row = {name: value for name, value in form.model_dump().items() if name not in ("point", "time", "domains", "slices")}
        return cls(
            **row,
            point=measured_point(form),
            time=None if form.time is None else DecodeTime(**form.time.model_dump()),
            domains={name: DomainQuality(**quality.model_dump()) for name, quality in form.domains.items()},
            slices={name: SliceScore(**found.model_dump()) for name, found in form.slices.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, the operating point in its own form, and the time where it was measured."""
        row = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "point": self.point and self.point.to_json(),
            "time": self.time and asdict(self.time),
            "domains": {name: asdict(quality) for name, quality in self.domains.items()},
            "slices": {name: asdict(found) for name, found in self.slices.items()},
        }
        return {name: value for name, value in row.items() if value or name not in ("time", "domains", "slices")}


@dataclass(frozen=True)
class Frontier(Result):
    """All points of one model and what they are compared with: plain top-k, and plain rounding to fewer bits.

    >>> import moe_prism
    >>> moe_prism.Frontier("mine", "source", 4, ()).to_json()["model"]
    'mine'
    """

    model: str
    source: str
    n_sub: int
    points: tuple[MeasuredPoint, ...]
    baseline_topk: tuple[MeasuredPoint, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    baseline_bits: tuple[MeasuredPoint, ...] = ()
    """The whole model in int8 and int4; none where the source is stored so, or where an older version measured."""

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
        return cls.of_form(check(FrontierForm, data, "frontier", REMEASURE))

    @classmethod
    def of_form(cls, form: FrontierForm) -> Frontier:
        """What a checked file says."""
        points, baseline, bits = (
            tuple(map(MeasuredPoint.of_form, rows)) for rows in (form.points, form.baseline_topk, form.baseline_bits)
        )
        return cls(form.model, form.source, form.n_sub, points, baseline, form.provenance, bits)

    def to_records(self) -> list[dict[str, Any]]:
        """A row per point: its numbers, its time where it was measured, its worst domain and its worst slice."""
        rows = []
        for point in self.every:
            row = {n: v for n, v in point.to_json().items() if not isinstance(v, dict)}
            worst = point.worst_domain
            time = {"ms_per_token": point.time.ms_per_token, "of_stock": point.time.of_stock} if point.time else {}
            domain = {"worst_domain": worst, "worst_domain_kl": point.domains[worst].kl} if worst else {}
            least = point.worst_slice
            kept = {"worst_slice": least, "worst_slice_kept": point.slices[least].kept} if least else {}
            rows.append(row | time | domain | kept)
        return rows

    def save(self, path: str | Path) -> None:
        """Write `frontier.json` at once or not at all; the same frontier gives the same bytes."""
        data = Frontier.from_json(self.to_json()).to_json()  # nothing is written that could not be read back
        write_atomic(path, (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Read what `save` wrote."""
        return cls.of_form(read_form(FrontierForm, Path(path), REMEASURE))


def write_atomic(path: str | Path, data: bytes) -> None:
    """`replace_file` for a path a person gave: UsageError if it cannot be written."""
    try:
        replace_file(Path(path), data)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", "choose a path in an existing, writable folder") from error
