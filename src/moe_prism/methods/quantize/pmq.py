"""PMQ: more bits for the experts that matter, fewer for the others (MC-MoE, arXiv 2410.06270; MC#, arXiv 2510.10962)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...compress.codec import Codec
from ...compress.codec.rtn import Rtn
from ...compress.quantize import QuantizeChange
from ...compress.quantize.allocate import Importance, cheapest, width_costs
from ...errors import UsageError
from ...point import NamedPoint, OperatingPoint
from ..base import Subject
from ..statistics import statistics_of
from .averaged import AveragedBits, one_choice

WIDTHS = 1, 2, 3
WEIGHED = {"error": Importance(0, 0, 2), "paper": Importance(1, 1, 2)}
"""An expert's squared error is a sum over its tokens, so it grows with how often it is chosen and with its weight: the paper counts both
twice more. On calibration text the error alone is better (docs/explanation/blocks-and-bits.md)."""
PAPER = (2, 3)
"""Widths that some expert of every layer has."""


@dataclass(frozen=True, kw_only=True)
class PmqParameters:
    """bits: mean width of the routed experts, 0: each of AVERAGES. scope: `layer`, the same mean in every layer, or `model`, one
    choice for all. by: `error`, the squared error that a width makes, or `paper`, that times how often and with what weight the expert is
    chosen. drop: whether an expert may get no bits at all. group: inputs that share a scale.
    """

    bits: float = 0
    scope: str = "layer"
    by: str = "error"
    drop: bool = False
    group: int = 32


class Pmq(AveragedBits):
    """`pmq:2.5`, or `pmq:bits=2.5:scope=model:drop=true`. Widths of 1 to 3 bits, rounded to nearest."""

    needs = ("how often and how strongly each expert is chosen", "a sample of its inputs")
    paper = "arXiv 2410.06270"
    Parameters = PmqParameters
    parameters: PmqParameters

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked, codec = self.parameters, Rtn()
        for field, value, legal in (("scope", asked.scope, ("layer", "model")), ("by", asked.by, tuple(WEIGHED))):
            if value not in legal:
                raise UsageError(f"'{self.name}' has no {field}={value}", f"write {field}={legal[0]} or {field}={legal[1]}")
        widths = (0, *WIDTHS) if asked.drop else WIDTHS
        averages = self.averages(asked.bits, widths)
        costs = costs_of(subject, codec, asked.group, widths, WEIGHED[asked.by])
        return [
            NamedPoint(
                name=self._name(mean),
                point=OperatingPoint(weights=QuantizeChange(codec, self._chosen(costs, widths, mean), asked.group).part()),
            )
            for mean in averages
        ]

    def _name(self, mean: float) -> str:
        asked, default = self.parameters, PmqParameters()
        more = [asked.scope] * (asked.scope != default.scope) + [asked.by] * (asked.by != default.by) + ["drop"] * asked.drop
        return "-".join(["pmq", f"{mean:g}", *more])

    def _chosen(self, costs: Sequence[Tensor], widths: Sequence[int], mean: float) -> tuple[tuple[float, ...], ...]:
        if self.parameters.scope == "layer":
            rows = [_row(own, widths, round(mean * len(own))) for own in costs]
            return tuple(tuple(map(float, row)) for row in rows)
        return one_choice(costs, widths, round(mean * sum(map(len, costs))))


def _row(costs: Tensor, widths: Sequence[int], total: int) -> list[int]:
    """Of one layer; without PAPER where the bits do not pay for it."""
    try:
        return cheapest(costs, widths, total, PAPER)
    except UsageError:
        return cheapest(costs, widths, total)


def costs_of(subject: Subject, codec: Codec, group: int, widths: Sequence[int], how: Importance) -> list[Tensor]:
    """[E, W] of every layer, measured once."""
    key = f"width costs {codec} {group} {widths} {how}"
    if key not in subject.cache:
        layers, gathered = [layer.parts.layer for layer in subject.elastic.layers], statistics_of(subject, ("counts", "tokens"))
        with subject.report("try widths") as update:
            found = []
            for layer, own in zip(layers, gathered.layers, strict=True):
                found.append(width_costs(layer, own, codec, group, [float(w) for w in widths], how))
                update(len(found), len(layers))
        subject.cache[key] = found
    return subject.cache[key]  # type: ignore[no-any-return]
