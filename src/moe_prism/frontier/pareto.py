"""Which operating points are worth having. Plain numbers in, plain numbers out; lower is better in both directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from ..errors import UsageError

MIN_GAP = 0.02  # two points are two choices only if their costs differ by this share (anchors: performance, section 2)


def pareto(costs: Sequence[float], losses: Sequence[float]) -> list[bool]:
    """True where no other point is at least as good in both directions and better in one.

    Equal points do not dominate each other: either both are kept or neither is.
    """
    _check(costs, losses)
    keep = [False] * len(costs)
    best = math.inf  # the lowest loss among the strictly cheaper points
    for _, group in _by_cost(costs):
        low = min(losses[i] for i in group)
        if low < best:
            for i in group:
                keep[i] = losses[i] == low
        best = min(best, low)
    return keep


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area between the (cost, loss) points and the reference corner, which is the worst cost and loss that still count.

    Points at or beyond the reference in either direction add nothing. Larger is better.
    """
    inside = sorted({(c, v) for c, v in points if c < reference[0] and v < reference[1]})
    area, ceiling = 0.0, reference[1]
    for cost, loss in inside:
        if loss < ceiling:
            area += (reference[0] - cost) * (ceiling - loss)
            ceiling = loss
    return area


def largest_cliff(costs: Sequence[float], losses: Sequence[float]) -> float:
    """The largest loss step between neighbours in cost, as a share (0..1) of the whole loss range.

    Of several points at one cost only the best counts. 0 where there is no step: fewer than two costs, or one loss.
    """
    _check(costs, losses)
    curve = [min(losses[i] for i in group) for _, group in _by_cost(costs)]
    span = max(curve, default=0.0) - min(curve, default=0.0)
    if span <= 0:
        return 0.0
    return max(abs(b - a) for a, b in pairwise(curve)) / span


def distinct_points(costs: Sequence[float], losses: Sequence[float], min_gap: float = MIN_GAP) -> list[int]:
    """Indices, cheapest first, of a largest set of non-dominated points whose costs all differ by `min_gap`.

    The gap is a share of the cheaper cost.
    """
    keep = pareto(costs, losses)
    chosen: list[int] = []
    for i in sorted((i for i, k in enumerate(keep) if k), key=lambda i: costs[i]):
        last = costs[chosen[-1]] if chosen else None
        if last is None or (costs[i] > last and costs[i] >= last * (1 + min_gap)):
            chosen.append(i)
    return chosen


def _by_cost(costs: Sequence[float]) -> list[tuple[float, list[int]]]:
    groups: dict[float, list[int]] = {}
    for i, cost in enumerate(costs):
        groups.setdefault(cost, []).append(i)
    return sorted(groups.items())


def _check(costs: Sequence[float], losses: Sequence[float]) -> None:
    if len(costs) != len(losses):
        raise UsageError(f"{len(costs)} costs but {len(losses)} losses", "give one loss for each cost")
    if not all(math.isfinite(c) for c in costs) or not all(math.isfinite(v) for v in losses):
        raise UsageError("a cost or loss is not a finite number", "leave out the points that could not be measured")
