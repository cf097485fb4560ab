"""Counts along straight lines (arXiv 2505.03531, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import UsageError
from ...routing.patterns import IndexOver, Rounding, pattern_skip, shaped, whole_total
from ..base import Subject
from .base import Fitted, SkipMethod, fitted_counts, given


@dataclass(frozen=True, kw_only=True)
class PatternParameters:
    """shape: b-h-e-p, or descending, ascending, peak, valley. rounding: of b-h-e-p, what becomes of half an expert.

    index_over: of b-h-e-p, whether its layers are the MoE layers or all.
    """

    shape: str = "descending"
    rounding: Rounding = "half-up"
    index_over: IndexOver = "moe"


class PatternSkip(SkipMethod):
    """`pattern-skip:B-H-E-P`, or `pattern-skip:SHAPE` (descending, the default; ascending, peak, valley) at any mean."""

    paper = "arXiv 2505.03531"
    Parameters = PatternParameters
    parameters: PatternParameters

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        knots, own = self._knots(), self.parameters
        if knots is None:
            return fitted_counts(shaped(subject.layers, subject.k, own.shape, given(self.name, mean)))
        b, h, e, p = knots
        total = None if mean is None else whole_total(subject.layers, subject.k, mean)
        rounding = own.rounding if total is None else "budget"
        places = _positions(subject) if own.index_over == "all" else None
        stage = pattern_skip(subject.layers, subject.k, (b, h, e, p), rounding=rounding, total=total, places=places)
        return fitted_counts(stage, {"rounding": rounding, "index_over": own.index_over})

    def means(self, subject: Subject) -> Sequence[float | None]:
        return super().means(subject) if self._knots() is None else [None]

    def _knots(self) -> tuple[int, int, int, int] | None:
        text = self.parameters.shape
        parts = text.split("-")
        if len(parts) != 4:
            return None
        if not all(part.isdigit() for part in parts):
            raise UsageError(f"'{text}' is no pattern", "give b-h-e-p in whole numbers, for example 4-2-2-3, or a shape")
        b, h, e, p = (int(part) for part in parts)
        return b, h, e, p


def _positions(subject: Subject) -> tuple[Sequence[int], int | None]:
    """1-based places of the MoE layers among all decoder layers, and how many those are."""
    depth = subject.model.config.get_text_config().num_hidden_layers
    places = []
    for layer in subject.elastic.layers:
        numbers = [int(part) for part in layer.parts.layer.name.split(".") if part.isdigit()]
        if not numbers:
            raise UsageError(f"cannot tell which layer '{layer.parts.layer.name}' is in", "use --index-over moe")
        places.append(numbers[0] + 1)
    return places, depth
