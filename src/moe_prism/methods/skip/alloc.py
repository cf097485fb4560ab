"""Alloc-MoE (arXiv 2604.08133) as a whole: a budget for every layer, then for every token of the batch.

The layers' counts come from `sensitivity:isolated`, an exact program over what a layer loses while all later ones have one expert. The
count of a layer, times the tokens of the batch, then goes to its largest routing weights. Both halves are methods of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from .batch_redistribution import BatchMethod
from .weight_cutoff import CountsParameters


@dataclass(frozen=True, kw_only=True)
class AllocParameters(CountsParameters):
    """counts: the method that says how many experts every layer keeps on average."""

    counts: str = "sensitivity:isolated"


class Alloc(BatchMethod):
    """`batch-redistribution` with the paper's own counts."""

    Parameters = AllocParameters
