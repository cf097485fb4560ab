"""A cutoff per layer that keeps the counts of another method on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...routing.weight_cutoff import WeightCutoff, fit_weight_cutoff
from ..base import Subject
from .base import COUNTS, Fitted, SkipMethod, counts_of, fitted_tokens, skip_method
from .profile import samples


@dataclass(frozen=True, kw_only=True)
class CountsParameters:
    """counts: the method that says how many experts every layer keeps on average."""

    counts: str = COUNTS


class WeightCutoffMethod(SkipMethod):
    """`weight-cutoff:METHOD`: a cutoff per layer that keeps the counts of another method (default `sensitivity`) on average."""

    needs = ("routing weights", "counts of another method")
    Parameters = CountsParameters
    parameters: CountsParameters

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        counts = counts_of(self.parameters.counts, subject, mean)
        fitted = fitted_tokens(subject, fit_weight_cutoff(counts.stage.layers, samples(subject)), WeightCutoff)
        return replace(fitted, facts={**counts.facts, **fitted.facts})

    def means(self, subject: Subject) -> Sequence[float | None]:
        return skip_method(self.parameters.counts).means(subject)
