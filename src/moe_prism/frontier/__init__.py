"""Operating points, their quality and cost, and which of them are worth having."""

from __future__ import annotations

from .pareto import distinct_points, hypervolume, largest_cliff, pareto
from .record import Frontier, Point

__all__ = ["Frontier", "Point", "distinct_points", "hypervolume", "largest_cliff", "pareto"]
