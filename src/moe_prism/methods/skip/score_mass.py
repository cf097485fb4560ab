"""The fewest experts that hold a share of the token's routing weight, the same share in all layers."""

from __future__ import annotations

from ...routing.score_mass import ScoreMass, fit_score_mass
from ..base import Subject
from .base import Fitted, SkipMethod, all_experts, fitted_tokens, given
from .profile import samples


class ScoreMassMethod(SkipMethod):
    """One share for all layers, fitted to the mean."""

    needs = ("routing weights",)

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        stage = fit_score_mass(all_experts(subject), samples(subject), given(self.name, mean))
        return fitted_tokens(subject, stage, ScoreMass)
