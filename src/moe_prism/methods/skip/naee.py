"""NAEE (arXiv 2402.14800): thresholds per layer and rank from calibration quantiles."""

from __future__ import annotations

from ...routing.token_threshold import TokenThreshold, fit_naee
from ..base import Subject
from .base import Fitted, SkipMethod, all_experts, fitted_tokens
from .profile import samples


class Naee(SkipMethod):
    """Thresholds per layer and rank from calibration quantiles; without a mean the paper's median."""

    needs = ("routing weights",)
    paper = "arXiv 2402.14800"

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        return fitted_tokens(subject, fit_naee(all_experts(subject), samples(subject), mean), TokenThreshold)
