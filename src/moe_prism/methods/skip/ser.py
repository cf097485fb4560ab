"""SER (ik_llama.cpp, pull request 239): experts whose weight is small beside the token's largest are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import UsageError
from ...routing.token_threshold import TokenThreshold, fit_ser
from ..base import Subject
from .base import Fitted, SkipMethod, all_experts, fitted_tokens, given
from .profile import samples


@dataclass(frozen=True, kw_only=True)
class SerParameters:
    """least: experts that are always computed, K_MIN."""

    least: int = 1


class Ser(SkipMethod):
    """`ser:K_MIN`: one threshold for all layers, the first K_MIN (1) experts always."""

    needs = ("routing weights",)
    paper = "ik_llama.cpp, pull request 239"
    Parameters = SerParameters
    parameters: SerParameters

    @classmethod
    def example(cls) -> str:
        return "1"

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        least = self._least(subject)
        stage = fit_ser(all_experts(subject), samples(subject), given(self.name, mean), least)
        return fitted_tokens(subject, stage, TokenThreshold)

    def means(self, subject: Subject) -> Sequence[float | None]:
        least = self._least(subject)
        return [mean for mean in super().means(subject) if mean is not None and mean >= least]

    def _least(self, subject: Subject) -> int:
        least = self.parameters.least
        if not 1 <= least <= subject.k:
            raise UsageError(f"'{least}' of '{self.name}' is no number of experts", f"give 1 to {subject.k}")
        return least
