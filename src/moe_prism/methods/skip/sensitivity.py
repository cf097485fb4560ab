"""Counts by what every layer loses with fewer experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ...errors import UsageError
from ...frontier.allocation import exact
from ...point import RoutingStage
from ...routing.patterns import whole_total
from ..base import Subject
from .base import Fitted, SkipMethod, calibration_facts, fitted_counts, given
from .profile import profile, refine

Variant = Literal["together", "alone", "isolated"]


@dataclass(frozen=True, kw_only=True)
class SensitivityParameters:
    """variant: `together` improves the whole plan; `alone` stops before that; `isolated` profiles each layer with all later ones at one."""

    variant: Variant = "together"


class Sensitivity(SkipMethod):
    """Counts by an exact dynamic program over what every layer loses with n experts, then improved together.

    Losses of layers alone do not add up, so one expert at a time moves from a layer to another as long as the measured loss of the whole
    plan falls. `sensitivity:alone` stops before that. `sensitivity:isolated` too, and profiles every layer with all later ones down to one
    expert, so that none makes up for the loss (Alloc-MoE, arXiv 2604.08133).
    """

    needs = ("calibration text",)
    paper = "arXiv 2604.08133 (isolated)"
    Parameters = SensitivityParameters
    parameters: SensitivityParameters

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        variant = self.parameters.variant
        if variant not in get_args(Variant):
            raise UsageError(
                f"method 'sensitivity' has no variant '{variant}'", "write sensitivity, sensitivity:alone or sensitivity:isolated"
            )
        total = whole_total(subject.layers, subject.k, given(self.name, mean))
        losses = profile(subject, isolated=variant == "isolated")
        best = exact([[(n + 1.0, loss) for n, loss in enumerate(row)] for row in losses], total)
        stage = RoutingStage(layers=tuple(choice + 1 for choice in best.choices))
        facts: dict[str, Any] = {"profile": [[round(loss, 9) for loss in row] for row in losses], "predicted_loss": best.loss}
        if variant == "together":
            counts, facts["calibration_loss"] = refine(subject, stage.layers)
            stage = replace(stage, layers=counts)
        return fitted_counts(stage, facts | calibration_facts(subject))
