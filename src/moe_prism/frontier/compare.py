"""Rules side by side, each by its whole curve."""

from __future__ import annotations

from dataclasses import dataclass

from .pareto import distinct_points, hypervolume, largest_cliff
from .record import Frontier


@dataclass(frozen=True)
class Comparison:
    """One rule's curve: measured points, distinct ones, hypervolume (share of the box, 1 is perfect) and largest KL step (share)."""

    rule: str
    points: int
    distinct: int
    hypervolume: float
    cliff: float


def comparison(frontier: Frontier) -> list[Comparison]:
    """Every rule, plain top-k and rounding alone, each with the full model as its dearest point.

    The box reaches from nothing to the full model's bytes and from KL 0 to the largest KL of any point, the same for all rules.
    """
    every = frontier.every
    full = next((p for p in every if p.budget >= 1), None)
    if full is None:
        return []
    box = (full.active_expert_bytes, max(p.kl for p in every))
    rows = []
    for rule in dict.fromkeys(p.rule for p in every):
        mine = [p for p in every if p.rule == rule]
        mine += [] if any(p.budget >= 1 for p in mine) else [full]
        costs, losses = [p.active_expert_bytes for p in mine], [p.kl for p in mine]
        volume = hypervolume(zip(costs, losses, strict=True), box) / max(box[0] * box[1], 1e-300)
        rows.append(Comparison(rule, len(mine), len(distinct_points(costs, losses)), volume, largest_cliff(costs, losses)))
    return rows
