"""The same number of experts in every layer: what `num_experts_per_tok` would do."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UsageError
from ...routing.patterns import uniform
from ..base import Subject
from .base import Fitted, SkipMethod, fitted_counts, given


class Uniform(SkipMethod):
    """n of k experts everywhere."""

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        mean = given(self.name, mean)
        if mean != int(mean):
            raise UsageError(f"method 'uniform' cannot keep {mean:g} experts", "give a whole number, or take `sensitivity`")
        return fitted_counts(uniform(subject.layers, subject.k, int(mean)))

    def means(self, subject: Subject) -> Sequence[float | None]:
        return sorted({mean for mean in super().means(subject) if mean is not None and mean == int(mean)}, reverse=True)
