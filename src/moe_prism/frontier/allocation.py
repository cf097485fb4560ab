"""One choice for every item under one total cost: the multiple-choice knapsack, for budgets per layer, levels per expert, and the like.

A table of curves holds (cost, loss) pairs: an array [I, C, 2], or one sequence of pairs per item where the items differ in how many
choices they have. `greedy_path` walks the lower convex hulls of all items at once, steepest step first, and so holds the allocation of
every budget; the linear relaxation, which bounds any allocation from below, lies on the same path (Zemel 1980). `exact` is
the dynamic program over whole costs, for checks and for sizes it can afford.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UsageError

Array = np.ndarray[Any, Any]
Curves = Array | Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Allocation:
    """The index of the choice taken for each item, and the sums of their costs and losses."""

    choices: tuple[int, ...]
    cost: float
    loss: float


@dataclass(frozen=True)
class GreedyPath:
    """Allocations of rising cost and falling loss: the cheapest choice everywhere, then one hull step of one item after another."""

    first: Array  # [I] choices before any step
    item: Array  # [S] whose choice a step changes
    choice: Array  # [S] to what
    costs: Array  # [S + 1] totals before the first step and after each
    losses: Array  # [S + 1]

    def steps(self, budget: float) -> int:
        """How many steps a budget pays for. Raises UsageError if it does not pay for the cheapest choices."""
        if not budget >= self.costs[0]:
            raise UsageError(
                f"budget {budget:g} is less than the cheapest choices cost together, {self.costs[0]:g}", "give at least that"
            )
        return int(np.searchsorted(self.costs, budget, side="right")) - 1

    def at(self, budget: float) -> Allocation:
        """The dearest allocation on the path that the budget pays for; at most one step of loss above the best there is."""
        steps = self.steps(budget)
        chosen = self.first.copy()
        chosen[self.item[:steps]] = self.choice[:steps]  # of several steps of one item the last counts
        return Allocation(tuple(chosen.tolist()), float(self.costs[steps]), float(self.losses[steps]))

    def bound(self, budget: float) -> float:
        """The least loss if choices could be mixed: no allocation within the budget loses less."""
        self.steps(budget)
        return float(np.interp(budget, self.costs, self.losses))


def hull_greedy(curves: Curves, budget: float) -> Allocation:
    """The greedy path up to `budget`, what is left then spent on the steepest moves that still fit.

    Optimal wherever the budget ends on a step, else less than one step of loss above the best. For many budgets, and for allocations that
    only ever grow with the budget, use `greedy_path`.
    """
    costs, losses = _table(curves)
    begun = greedy_path(curves).at(budget)
    rows, now, room = np.arange(len(costs)), np.array(begun.choices, np.int64), budget - begun.cost
    while True:
        slope, then = _steepest(costs, losses, now, room)
        item = int(slope.argmax()) if len(slope) else 0
        if not len(slope) or slope[item] <= 0:
            break
        room -= costs[item, then[item]] - costs[item, now[item]]
        now[item] = then[item]
    return Allocation(tuple(now.tolist()), math.fsum(costs[rows, now]), math.fsum(losses[rows, now]))


def lp_bound(curves: Curves, budget: float) -> float:
    """Optimum of the linear relaxation, a lower bound on the loss of every allocation within `budget`."""
    return greedy_path(curves).bound(budget)


def greedy_path(curves: Curves) -> GreedyPath:
    """All greedy allocations in one pass: O(I C^2 + S log S) for I items of C choices and S hull steps.

    Raises UsageError for an item without choices or a number that is not finite.
    """
    costs, losses = _table(curves)
    rows = np.arange(len(costs))
    first = np.lexsort((losses, costs), axis=1)[:, 0]
    now, steps, steep = first, [], np.full(len(costs), np.inf)
    while True:
        slope, then = _steepest(costs, losses, now)
        moving = slope > 0
        if not moving.any():
            break
        steep = np.where(moving, np.minimum(slope, steep), steep)  # falls along a hull but for rounding; the order must not
        steps.append(np.stack([rows, now, then, steep])[:, moving])
        now = np.where(moving, then, now)
    item, old, new, slope = np.concatenate(steps, axis=1) if steps else np.zeros((4, 0))
    order = np.argsort(-slope, kind="stable")  # steps were added round by round, so an item's own stay in order
    item, old, new = (part[order].astype(np.int64) for part in (item, old, new))
    start = math.fsum(costs[rows, first]), math.fsum(losses[rows, first])
    return GreedyPath(
        first,
        item,
        new,
        start[0] + np.concatenate([[0.0], np.cumsum(costs[item, new] - costs[item, old])]),
        start[1] + np.concatenate([[0.0], np.cumsum(losses[item, new] - losses[item, old])]),
    )


def _steepest(costs: Array, losses: Array, now: Array, room: float = math.inf) -> tuple[Array, Array]:
    """(slope, choice) [I] of the steepest fall of loss per cost from the choices `now` within `room`; of equals the nearest."""
    rise = costs - np.take_along_axis(costs, now[:, None], 1)
    fall = np.take_along_axis(losses, now[:, None], 1) - losses
    slope = np.full_like(costs, -np.inf)
    np.divide(fall, rise, out=slope, where=(rise > 0) & (rise <= room) & np.isfinite(losses))
    best = slope.max(axis=1)
    return best, np.where(slope == best[:, None], costs, np.inf).argmin(axis=1)


def exact(curves: Curves, budget: int) -> Allocation:
    """The best allocation within `budget`, by dynamic programming over whole costs: O(I C B) time and O(I B) bytes.

    Raises UsageError where costs are not whole numbers, or the budget does not pay for the cheapest choices.
    """
    costs, losses = _table(curves)
    real = np.isfinite(losses)
    if (costs[real] != np.round(costs[real])).any():
        raise UsageError("a cost is not a whole number", "count costs in units that all of them are multiples of")
    least = np.where(real, costs, np.inf).min(axis=1)
    room = math.floor(budget - least.sum())
    if room < 0:
        raise UsageError(
            f"budget {budget:g} is less than the cheapest choices cost together, {least.sum():g}", "give at least that"
        )
    extra = np.where(real, costs - least[:, None], room + 1).astype(np.int64)
    room = min(room, int(np.where(real, extra, 0).max(axis=1).sum()))
    chosen = _backtrack(extra, _decide(extra, losses, room))
    rows = np.arange(len(costs))
    return Allocation(tuple(chosen.tolist()), math.fsum(costs[rows, chosen]), math.fsum(losses[rows, chosen]))


def _decide(extra: Array, losses: Array, room: int) -> Array:
    """taken [I, room + 1]: the choice of item i in the best allocation of items 0..i that costs at most b."""
    taken = np.zeros((len(extra), room + 1), np.min_scalar_type(extra.shape[1]))
    best = np.zeros(room + 1)
    for i, (prices, values) in enumerate(zip(extra.tolist(), losses.tolist(), strict=True)):
        found = np.full(room + 1, np.inf)
        for c, (price, value) in enumerate(zip(prices, values, strict=True)):
            if price <= room and value < np.inf:
                candidate = best[: room + 1 - price] + value
                better = candidate < found[price:]
                np.copyto(found[price:], candidate, where=better)
                np.copyto(taken[i, price:], c, where=better)
        best = found
    return taken


def _backtrack(extra: Array, taken: Array) -> Array:
    chosen, left = np.zeros(len(extra), np.int64), taken.shape[1] - 1
    for i in range(len(extra) - 1, -1, -1):
        chosen[i] = taken[i, left]
        left -= int(extra[i, chosen[i]])
    return chosen


def _table(curves: Curves) -> tuple[Array, Array]:
    """costs, losses [I, C]; where an item has fewer choices than others, its last ones cost and lose infinitely much."""
    if isinstance(curves, np.ndarray):
        table = curves.astype(np.float64)
        if table.ndim != 3 or table.shape[2] != 2 or not table.shape[1]:
            raise UsageError(f"curves have the shape {table.shape}", "give [items, choices, 2] with cost and loss")
        if not np.isfinite(table).all():
            raise UsageError("a cost or loss is not a finite number", "leave such choices out")
        return table[..., 0], table[..., 1]
    if not all(len(curve) for curve in curves):
        raise UsageError("an item has no choices", "give at least one (cost, loss) for each")
    width = max((len(curve) for curve in curves), default=1)
    padded = np.full((len(curves), width, 2), np.inf)
    for row, curve in zip(padded, curves, strict=True):
        row[: len(curve)] = curve
        if not np.isfinite(row[: len(curve)]).all():
            raise UsageError("a cost or loss is not a finite number", "leave such choices out")
    return padded[..., 0], padded[..., 1]
