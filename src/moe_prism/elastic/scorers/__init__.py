"""Scorers: estimates of the output norm of every candidate block, without computing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry import Registry

if TYPE_CHECKING:
    from ..base import Scorer

scorers: Registry[type[Scorer]] = Registry(
    "scorer",
    {
        "ridge": (
            "moe_prism.elastic.scorers.ridge:Ridge",
            "output norms predicted from input and gate neurons, fitted in closed form (default)",
        ),
        "low-rank": (
            "moe_prism.elastic.scorers.low_rank:LowRankScorer",
            "the same from a few shared projections of the input: fewer weights per expert, less exact; fitted on request",
        ),
        "gates": (
            "moe_prism.elastic.scorers.gates:GateScores",
            "the paper's proxy: mean |activation| of the gate neurons",
            "arXiv 2510.19366",
        ),
        "oracle": ("moe_prism.elastic.scorers.oracle:Oracle", "true output norms: costs the full layer, for analysis only"),
    },
)
