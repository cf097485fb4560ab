"""Operating points, their quality and cost, and which of them are worth having."""

from __future__ import annotations

from .compare import Comparison, comparison
from .pareto import distinct_points, hypervolume, largest_cliff, pareto
from .record import Frontier, Point

__all__ = ["Comparison", "Frontier", "Point", "comparison", "distinct_points", "hypervolume", "largest_cliff", "pareto"]
