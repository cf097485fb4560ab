"""Alloc-MoE (arXiv 2604.08133), token level: the counts of another method as a budget of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..base import Subject
from .base import Fitted, SkipMethod, counts_of, skip_method
from .weight_cutoff import CountsParameters


class BatchMethod(SkipMethod):
    """`batch-redistribution:METHOD`: the counts of another method (default `sensitivity`) go to the batch's largest weights."""

    needs = ("counts of another method",)
    paper = "arXiv 2604.08133"
    depends_on_batch = True
    Parameters = CountsParameters
    parameters: CountsParameters

    def fit(self, subject: Subject, mean: float | None) -> Fitted:
        counts = counts_of(self.parameters.counts, subject, mean)
        base = {"base": ((1.0,),) * len(counts.stage.layers)}
        return replace(counts, stage=replace(counts.stage, stage="batch-redistribution", parameters=base))

    def means(self, subject: Subject) -> Sequence[float | None]:
        return skip_method(self.parameters.counts).means(subject)
