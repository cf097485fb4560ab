"""Blocks by what they are predicted to add, then neurons of the kept ones by their gates: `threshold` and `gate-threshold` together.

A dropped block costs nothing but its prediction, and its gates need not be read. A kept block reads its gate rows, a third of it, and of up
and down only what is worth it. The first choice is cheap and coarse, the second fine and with a floor. Where blocks have a share s of the
bytes, SHARE s of an expert's neurons pass the cutoff of their layer. The ratio was chosen on prism-nano, on calibration text. A mean of
m of k experts stands for the share m / k of the bytes of k experts, with all that is read to choose; s is found by counting them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...elastic.bind import Step, bind
from ...errors import UsageError
from ...frontier.cost import measured_cost
from ...point import FULL, NamedPoint, OperatingPoint
from ..base import Subject
from .base import Fitted, SkipMethod, given
from .gate_threshold import FLOOR, GateThreshold

SHARE = 0.6
WINDOWS, TRIES = 4, 7  # of the calibration text that bytes are counted on, and halvings


@dataclass(frozen=True, kw_only=True)
class BothParameters:
    """share: of an expert's neurons that pass, to the budget of blocks."""

    share: float = SHARE


class BlocksAndNeurons(SkipMethod):
    """`blocks-and-neurons:SHARE`: `threshold`, with the cutoffs of gates that suit its budget."""

    needs = ("sub-experts", "calibration text")
    paper = "arXiv 2510.19366, 2605.08575"
    needs_sub_experts = True
    leaves_out_neurons = True
    Parameters = BothParameters
    parameters: BothParameters

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        """The stage alone; `point` adds the budget, which is among the facts."""
        mean = given(self.name, mean)
        if subject.n_sub == 1:
            raise UsageError(
                f"method '{self.name}' needs sub-experts, and this model has none", "refactor it, or take gate-threshold"
            )
        if not 0 < self.parameters.share <= 1:
            raise UsageError(f"'{self.name}' is no share of the neurons", "give a number in (0, 1]")
        low, high = 0.05, 1.0
        for _ in range(TRIES):
            middle = (low + high) / 2
            low, high = (middle, high) if self._read(subject, middle) < mean else (low, middle)
        fitted = self._stage(subject, high)
        return replace(fitted, mean=self._read(subject, high), facts={**fitted.facts, "budget": high})

    def point(self, subject: Subject, mean: float | None, keep_mass: bool | None = None) -> NamedPoint:
        named = super().point(subject, mean, keep_mass)
        slots = FULL.with_budget(named.made["budget"], "threshold").slots
        return replace(named, point=replace(named.point, slots=slots))

    def _stage(self, subject: Subject, budget: float) -> Fitted:
        share = self.parameters.share * budget
        return GateThreshold("gate-threshold", GateThreshold.Parameters()).fit(subject, subject.k * (FLOOR + (1 - FLOOR) * share))

    @torch.no_grad()
    def _read(self, subject: Subject, budget: float) -> float:
        """Bytes per token at a budget, in experts."""
        elastic = subject.elastic
        stage = replace(self._stage(subject, budget).stage, keep_mass=False)
        point = OperatingPoint(routing=(stage,), slots=FULL.with_budget(budget, "threshold").slots)
        step = Step(bind(elastic, [point]))
        with elastic.at(step), elastic.count():
            subject.model(input_ids=subject.calibration[:WINDOWS].to(subject.model.device), use_cache=False, logits_to_keep=1)
            read = measured_cost(elastic, step).active_expert_bytes
        whole = sum(layer.parts.layer.parameters_per_expert() for layer in elastic.layers) * elastic.stored_bytes_per_weight
        return read / whole

    def means(self, subject: Subject) -> Sequence[float | None]:
        """Below the bytes that all blocks with their share of neurons read."""
        most = subject.k * (FLOOR + (1 - FLOOR) * self.parameters.share)
        return [1 + (mean - 1) * (most - 1) / (subject.k - 1) for mean in super().means(subject) if mean is not None]
