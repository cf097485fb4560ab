"""Blocks by what they are predicted to add, then neurons of the kept ones by their gates: `threshold` and `gate-threshold` together.

A dropped block costs nothing but its prediction, and its gates need not be read. A kept block reads its gate rows, a third of it, and of up
and down only what is worth it. The first choice is cheap and coarse, the second fine and with a floor. Where blocks have a share s of the
bytes, SHARE s of an expert's neurons pass the cutoff of their layer. The ratio was chosen on prism-nano, on calibration text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...errors import UsageError
from ...point import FULL, NamedPoint, OperatingPoint
from ...routing.base import Stage
from ..base import Method, Subject
from ..skip.gate_threshold import FLOOR, GateThreshold, GateThresholdStage

SHARE = 0.6
BUDGETS = (0.95, 0.8, 0.6, 0.45, 0.3)


@dataclass(frozen=True, kw_only=True)
class BothParameters:
    """share: of an expert's neurons that pass, to the budget of blocks."""

    share: float = SHARE


class BlocksAndNeurons(Method):
    """`blocks-and-neurons:SHARE`: `threshold` at several budgets, each with the cutoffs of gates that suit it."""

    acts = "slots"
    needs = ("sub-experts", "calibration text")
    paper = "arXiv 2510.19366, 2605.08575"
    needs_sub_experts = True
    stage: ClassVar[type[Stage]] = GateThresholdStage
    Parameters = BothParameters
    parameters: BothParameters

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        if subject.n_sub == 1:
            raise UsageError(
                f"method '{self.name}' needs sub-experts, and this model has none", "refactor it, or take gate-threshold"
            )
        if not 0 < self.parameters.share <= 1:
            raise UsageError(f"'{self.name}' is no share of the neurons", "give a number in (0, 1]")
        count = len(BUDGETS) if subject.points is None else max(2, subject.points)
        low, high = BUDGETS[-1], BUDGETS[0]
        budgets = BUDGETS if subject.points is None else [high - (high - low) * i / (count - 1) for i in range(count)]
        return [self._point(subject, budget) for budget in budgets]

    def _point(self, subject: Subject, budget: float) -> NamedPoint:
        share = self.parameters.share * budget
        mean = subject.k * (FLOOR + (1 - FLOOR) * share)
        fitted = GateThreshold("gate-threshold", GateThreshold.Parameters()).fit(subject, mean)
        point = OperatingPoint(routing=(fitted.stage,), slots=FULL.with_budget(budget, "threshold").slots)
        return NamedPoint(name=f"{self.name}-{budget:.3g}", point=point, made={"method": self.name, "neurons": share})
