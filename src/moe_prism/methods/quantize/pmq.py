"""PMQ: more bits for the experts that matter, fewer for the others (MC-MoE, arXiv 2410.06270; MC#, arXiv 2510.10962)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compress.codec.rtn import Rtn
from ...compress.quantize import QuantizeChange
from ...compress.quantize.allocate import cheapest, width_costs
from ...errors import UsageError
from ...frontier.allocation import exact
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject
from ..statistics import statistics_of

AVERAGES = 3.5, 3.0, 2.5, 2.0
WIDTHS = 1, 2, 3, 4
PAPER = (2, 3)
"""Widths that some expert of every layer has."""


@dataclass(frozen=True, kw_only=True)
class PmqParameters:
    """bits: mean width of the routed experts, 0: each of AVERAGES. scope: `layer`, the same mean in every layer, or `model`, one
    choice for all. drop: whether an expert may get no bits at all. group: inputs that share a scale.
    """

    bits: float = 0
    scope: str = "layer"
    drop: bool = False
    group: int = 32


class Pmq(Method):
    """`pmq:2.5`, or `pmq:bits=2.5:scope=model:drop=true`. Widths of 1 to 4 bits, rounded to nearest."""

    acts = "weights"
    needs = ("how often and how strongly each expert is chosen", "a sample of its inputs")
    paper = "arXiv 2410.06270"
    Parameters = PmqParameters
    parameters: PmqParameters

    @classmethod
    def set_by(cls, name: str, parameter: str) -> str:
        return f"{name}:{parameter}={parameter.upper()}"

    @classmethod
    def example(cls) -> str | None:
        return "2.5"

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        asked, codec = self.parameters, Rtn()
        if asked.scope not in ("layer", "model"):
            raise UsageError(f"'{asked.scope}' is no scope of '{self.name}'", "write scope=layer or scope=model")
        averages = (asked.bits,) if asked.bits else AVERAGES
        widths = (0, *WIDTHS) if asked.drop else WIDTHS
        for mean in averages:
            if not min(widths) <= mean <= max(widths):
                raise UsageError(
                    f"{mean:g} bits are outside {min(widths)} to {max(widths)}", f"write {self.name.partition(':')[0]}:2.5"
                )
        costs = costs_of(subject, codec, asked.group, widths)
        return [
            NamedPoint(
                name=f"{self.name.partition(':')[0]}-{mean:g}{'' if asked.scope == 'layer' else '-model'}{'-drop' if asked.drop else ''}",
                point=OperatingPoint(weights=QuantizeChange(codec, self._chosen(costs, widths, mean), asked.group).part()),
            )
            for mean in averages
        ]

    def _chosen(self, costs: Sequence[Tensor], widths: Sequence[int], mean: float) -> tuple[tuple[float, ...], ...]:
        if self.parameters.scope == "layer":
            rows = [_row(own, widths, round(mean * len(own))) for own in costs]
            return tuple(tuple(map(float, row)) for row in rows)
        every = torch.cat(list(costs))
        curves = [[(float(w), cost) for w, cost in zip(widths, row, strict=True)] for row in every.tolist()]
        choices = [float(widths[c]) for c in exact(curves, round(mean * len(every))).choices]
        ends = torch.tensor([0, *map(len, costs)]).cumsum(0).tolist()
        return tuple(tuple(choices[a:b]) for a, b in itertools.pairwise(ends))


def _row(costs: Tensor, widths: Sequence[int], total: int) -> list[int]:
    """Of one layer; without PAPER where the bits do not pay for it."""
    try:
        return cheapest(costs, widths, total, PAPER)
    except UsageError:
        return cheapest(costs, widths, total)


def costs_of(subject: Subject, codec: Rtn, group: int, widths: Sequence[int]) -> list[Tensor]:
    """[E, W] of every layer, measured once."""
    key = f"width costs {codec} {group} {widths}"
    if key not in subject.cache:
        layers, gathered = [layer.parts.layer for layer in subject.elastic.layers], statistics_of(subject, ("counts", "tokens"))
        with subject.report("try widths") as update:
            found = []
            for layer, own in zip(layers, gathered.layers, strict=True):
                found.append(width_costs(layer, own, codec, group, [float(w) for w in widths]))
                update(len(found), len(layers))
        subject.cache[key] = found
    return subject.cache[key]  # type: ignore[no-any-return]
