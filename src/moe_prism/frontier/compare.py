"""Rules side by side, each by its whole curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .pareto import distinct_points, hypervolume, largest_cliff
from .record import Frontier


@dataclass(frozen=True)
class Comparison:
    """One rule's curve: measured points, distinct ones, hypervolume (share of the box, 1 is perfect) and largest KL step (share).

    sends: the hypervolume with sends in the place of bytes; 0 where they were not recorded.
    """

    rule: str
    points: int
    distinct: int
    hypervolume: float
    cliff: float
    sends: float = 0.0


def comparison(frontier: Frontier) -> list[Comparison]:
    """Every rule, plain top-k and rounding alone, each with the full model as its dearest point.

    The box reaches from nothing to the full model's bytes (or sends) and from KL 0 to the largest KL of any point, the same for all rules.
    """
    every = frontier.every
    full = next((p for p in every if p.budget >= 1), None)
    if full is None:
        return []
    most = max(p.kl for p in every)
    rows = []
    for rule in dict.fromkeys(p.rule for p in every):
        mine = [p for p in every if p.rule == rule]
        mine += [] if any(p.budget >= 1 for p in mine) else [full]
        costs, losses = [p.active_expert_bytes for p in mine], [p.kl for p in mine]
        volume = _volume(costs, losses, (full.active_expert_bytes, most))
        sends = _volume([p.sends for p in mine], losses, (full.sends, most))
        distinct = len(distinct_points(costs, losses))
        rows.append(Comparison(rule, len(mine), distinct, volume, largest_cliff(costs, losses), sends))
    return rows


def _volume(costs: Sequence[float], losses: Sequence[float], box: tuple[float, float]) -> float:
    """Share of the box."""
    return hypervolume(zip(costs, losses, strict=True), box) / max(box[0] * box[1], 1e-300)
