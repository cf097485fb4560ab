"""The rule `bits` as a method: what each width loses is measured on calibration text, then one point per budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...elastic.coded import codec_of
from ...elastic.compensate.base import outputs
from ...elastic.dial import affordable
from ...elastic.layer import ElasticLayer
from ...errors import UsageError
from ...point import NamedPoint, OperatingPoint, SlotBits, SlotRule
from ..base import Method, Subject
from ..statistics import statistics_of

BUDGETS = (0.45, 0.33, 0.25, 0.2, 0.16, 0.13, 0.11)
"""Shares of the bytes of the model as it is stored; half of them is what 8 bits take."""
SAMPLE = 128  # inputs of an expert that its errors are measured on


@dataclass(frozen=True, kw_only=True)
class BitsParameters:
    """widths: bits that a slot may have, with - between; group: weights that share a scale; choosing: bits of gate neurons, 0: the most."""

    widths: str = "2-3-4-5-6-8"
    group: int = 64
    choosing: float = 4


class BitsMethod(Method):
    """`bits`, or with settings `bits:widths=2-4-8:group=32`."""

    acts = "slots"
    needs = ("sub-experts", "calibration text")
    needs_sub_experts = True
    Parameters = BitsParameters
    parameters: BitsParameters

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        bits = self.fitted(subject)
        asked = BUDGETS if subject.points is None else even(BUDGETS, subject.points)
        budgets = affordable(subject.elastic, asked, SlotRule(rule="bits", budget=BUDGETS[0], bits=bits))
        return [
            NamedPoint(
                name=f"{self.name}-{budget:.3g}", point=OperatingPoint(slots=SlotRule(rule="bits", budget=budget, bits=bits))
            )
            for budget in budgets
        ]

    def fitted(self, subject: Subject) -> SlotBits:
        """With the errors of this model; measured once for all points."""
        asked, widths = self.parameters, self._widths()
        bits = SlotBits(
            widths=widths,
            errors=tuple((0.0,) * len(widths) for _ in range(subject.layers)),
            group=asked.group,
            choosing=asked.choosing or widths[-1],
        )
        codec_of(widths).check(widths[-1], asked.group)
        key = f"slot-errors {widths} {asked.group}"
        if key not in subject.cache:
            subject.cache[key] = tuple(slot_errors(layer, bits, rows) for layer, rows in zip(*sampled(subject), strict=True))
        return SlotBits(widths=widths, errors=subject.cache[key], group=bits.group, choosing=bits.choosing)

    def _widths(self) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in self.parameters.widths.split("-"))
        except ValueError as error:
            raise UsageError(f"widths '{self.parameters.widths}' are no numbers", "write such as 2-3-4-8") from error


def even(values: Sequence[float], count: int) -> list[float]:
    """`count` of them, evenly spread, both ends among them."""
    places = torch.linspace(0, len(values) - 1, min(count, len(values))).round().long().tolist()
    return [values[place] for place in places]


def sampled(subject: Subject) -> tuple[list[ElasticLayer], list[dict[str, Tensor]]]:
    """Layers and, of each, inputs of every expert with their routing weights: one pass over the calibration text."""
    found = statistics_of(subject, ("tokens",), SAMPLE).layers
    return list(subject.elastic.layers), [layer.values["tokens"] for layer in found]


@torch.no_grad()
def slot_errors(layer: ElasticLayer, bits: SlotBits, rows: dict[str, Tensor]) -> tuple[float, ...]:
    """Of one layer: for every width the squared error of a slot's output, over that of dropping it and making up for it.

    rows: x [E, S, d], weight [E, S], kept [E] of the reservoir. Sums over experts, blocks and inputs, by the squared routing weight.
    """
    parts, coded = layer.parts, layer.coded(bits)
    lost = 0.0
    errors = dict.fromkeys(bits.widths, 0.0)
    for expert in range(parts.layer.num_experts):
        count = int(rows["kept"][expert])
        if not count:
            continue
        x = rows["x"][expert, :count].to(parts.layer.up.device, parts.layer.up.dtype)
        weight = rows["weight"][expert, :count].to(x.device).double().square()[:, None]
        for n in range(parts.n_sub):
            out = outputs(parts, x, expert, n)
            made_up = None if layer.compensator is None else layer.compensator.estimate(x, expert, n)
            lost += float(((out if made_up is None else out - made_up).double().square() * weight).sum())
            for width in bits.widths:
                errors[width] += float(((out - outputs(coded.at(width), x, expert, n)).double().square() * weight).sum())
    return tuple(error / max(lost, 1e-30) for error in errors.values())
