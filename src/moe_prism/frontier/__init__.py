"""Operating points, their quality and cost, and which of them are worth having."""

from __future__ import annotations

from .allocation import Allocation, GreedyPath, exact, greedy_path, hull_greedy, lp_bound
from .compare import Comparison, comparison
from .pareto import distinct_points, hypervolume, largest_cliff, pareto
from .record import DecodeTime, DomainQuality, Frontier, MeasuredPoint, SliceScore

__all__ = [
    "Allocation",
    "Comparison",
    "DecodeTime",
    "DomainQuality",
    "Frontier",
    "GreedyPath",
    "MeasuredPoint",
    "SliceScore",
    "comparison",
    "distinct_points",
    "exact",
    "greedy_path",
    "hull_greedy",
    "hypervolume",
    "largest_cliff",
    "lp_bound",
    "pareto",
]
