"""Plans by shape: the same count everywhere, and the piecewise linear `pattern-skip` (b, h, e, p) of arXiv 2505.03531, section 4.

The method is called `pattern-skip` here because `pattern` is the selection rule of another paper (arXiv 2510.19366).
What the paper leaves open is settled in docs/explanation/skipping.md:
what counts as a layer, the rounding, and that the ends win over the knee.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

from ..errors import UsageError
from ..point import RoutingStage

Rounding = Literal["half-up", "floor", "ceil", "budget"]
IndexOver = Literal["moe", "all"]


def uniform(layers: int, k: int, n: int) -> RoutingStage:
    """n of k experts in every layer."""
    if not 1 <= n <= k:
        raise UsageError(f"{n} experts per token is outside 1..{k}", "give a whole number of experts the model has per token")
    return RoutingStage(layers=(n,) * layers)


def pattern_skip(
    layers: int,
    k: int,
    knots: tuple[float, float, float, int],
    *,
    rounding: Rounding = "half-up",
    total: int | None = None,
    places: tuple[Sequence[int], int | None] | None = None,
) -> RoutingStage:
    """knots (b, h, e, p): b experts in the first layer, h in layer p (1-based), e in the last, lines between; clamped to 1..k.

    places (positions, depth): index over all decoder layers, of which the MoE layers are at `positions` (1-based) of `depth`; None: over
    the MoE layers alone. rounding "budget": largest remainders first, so that the counts add up to `total` (None: to the rounded sum of
    the lines).
    Raises UsageError for a p outside the layers, or a total outside layers..k*layers.
    """
    if rounding not in get_args(Rounding):
        raise UsageError(f"unknown rounding '{rounding}'", f"choose one of: {', '.join(get_args(Rounding))}")
    if total is not None and rounding != "budget":
        raise UsageError("a total needs rounding 'budget'", "give both or neither")
    b, h, e, p = knots
    positions, depth = (range(1, layers + 1), layers) if places is None else places
    last = depth or max(positions)
    if not 1 <= p <= last:
        raise UsageError(f"p = {p} is outside the layers 1..{last}", "give the 1-based layer of the knee")
    lines = [_clamp(_value(place, last, Fraction(b), Fraction(h), Fraction(e), p), k) for place in positions]
    if rounding == "budget":
        counts = to_budget(lines, k, _half_up(sum(lines, Fraction())) if total is None else total)
    else:
        counts = [_rounded(line, rounding) for line in lines]
    return RoutingStage(layers=tuple(counts))


def to_budget(values: Sequence[Fraction], k: int, total: int) -> list[int]:
    """Whole numbers 1..k that add up to `total`, each next unit where the value is furthest above its count; of equals the first layer."""
    if not len(values) <= total <= k * len(values):
        raise UsageError(
            f"{total} experts in all is outside {len(values)}..{k * len(values)}", "every layer keeps between 1 and k experts"
        )
    counts = [math.floor(_clamp(value, k)) for value in values]
    while sum(counts) < total:
        _, _, layer = max((value - n, -i, i) for i, (value, n) in enumerate(zip(values, counts, strict=True)) if n < k)
        counts[layer] += 1
    while sum(counts) > total:
        _, _, layer = min((value - n, i, i) for i, (value, n) in enumerate(zip(values, counts, strict=True)) if n > 1)
        counts[layer] -= 1
    return counts


def shaped(layers: int, k: int, shape: str, mean: float) -> RoutingStage:
    """`descending`, `ascending`, `peak` or `valley` as steep as a mean allows, its counts adding up to the mean exactly."""
    total = whole_total(layers, k, mean)
    spread = Fraction(min(k - mean, mean - 1))
    low, high = Fraction(mean) - spread, Fraction(mean) + spread
    knees = {
        "descending": (high, low, low, layers),
        "ascending": (low, high, high, layers),
        "peak": (low, high, low, (layers + 1) // 2),
        "valley": (high, low, high, (layers + 1) // 2),
    }
    if shape not in knees:
        raise UsageError(f"unknown shape '{shape}'", f"choose one of: {', '.join(knees)}, or b-h-e-p")
    b, h, e, p = knees[shape]
    lines = [_value(place, layers, b, h, e, p) for place in range(1, layers + 1)]
    return RoutingStage(layers=tuple(to_budget(lines, k, total)))


def whole_total(layers: int, k: int, mean: float) -> int:
    """mean * layers as the whole number of experts it must be."""
    total = round(mean * layers)
    if not layers <= total <= k * layers or not math.isfinite(mean):
        raise UsageError(f"a mean of {mean:g} experts per token is outside 1..{k}", "give a number between them")
    return total


def _value(place: int, last: int, b: Fraction, h: Fraction, e: Fraction, p: int) -> Fraction:
    """The line at a 1-based place. The ends win: with p at an end, the line starts (or ends) at h there, and b (or e) is its value."""
    if place == 1:
        return b
    if place == last:
        return e
    if place <= p:
        start = b if p > 1 else h
        return start + (h - start) * Fraction(place - 1, max(p - 1, 1))
    return h + (e - h) * Fraction(place - p, last - p)


def _clamp(value: Fraction, k: int) -> Fraction:
    return min(max(value, Fraction(1)), Fraction(k))


def _rounded(value: Fraction, rounding: Rounding) -> int:
    if rounding == "half-up":
        return _half_up(value)
    return math.floor(value) if rounding == "floor" else math.ceil(value)


def _half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))
