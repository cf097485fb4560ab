"""The rule `first-slot` as a method: budgets along its dial, at a toll per expert or per device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...elastic.rules.first_slot import TOLL
from ...point import NamedPoint, Toll
from ..base import Subject
from .rules import RuleMethod


@dataclass(frozen=True, kw_only=True)
class FirstSlotParameters:
    """toll: slots at the cutoff that sending a token costs; devices: that the experts of a layer are on, 0: as many as experts."""

    toll: float = TOLL.price
    devices: int = 0


class FirstSlotMethod(RuleMethod):
    """`first-slot:TOLL`, or `first-slot:toll=8:devices=16`."""

    Parameters = FirstSlotParameters
    parameters: FirstSlotParameters

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        toll = Toll(price=self.parameters.toll, devices=self.parameters.devices)
        if toll == TOLL:
            return super().points(subject)
        return [
            replace(named, point=replace(named.point, slots=replace(named.point.slots, toll=toll)))
            for named in super().points(subject)
        ]
