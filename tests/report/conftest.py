"""A frontier like the ones prism-nano gives: KL interpolated between measured points."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from moe_prism.frontier import Frontier, MeasuredPoint, pareto
from moe_prism.point import FULL

MEASURED = {4: 0.104, 8: 0.024, 12: 0.0059, 15: 0.0011}  # K of 16 slots -> KL
PLAIN = {3: 0.0106, 2: 0.0395, 1: 0.178}
FULL_PARAMS = 8 * 4 * 3 * 384 * 384


def interpolated(slots: int) -> float:
    if slots == 16:
        return 0.0
    low, high = max(k for k in MEASURED if k <= slots), min(k for k in MEASURED if k >= slots)
    part = (slots - low) / (high - low or 1)
    return math.exp((1 - part) * math.log(MEASURED[low]) + part * math.log(MEASURED[high]))


def point(name: str, rule: str, slots: float, kl: float) -> MeasuredPoint:
    params = FULL_PARAMS * slots / 16
    agreement = 1 - 0.62 * kl**0.55
    ran = FULL.with_budget(slots / 16, "whole-experts" if rule == "topk" else rule)
    return MeasuredPoint(
        name, rule, slots / 16, slots, 9.37 * math.exp(0.9 * kl), kl, agreement, params, 2 * params, 2 * params, False, point=ran
    )


def marked(points: list[MeasuredPoint]) -> list[MeasuredPoint]:
    return [replace(p, pareto=k) for p, k in zip(points, pareto([p.budget for p in points], [p.kl for p in points]), strict=True)]


def make_frontier(rules: tuple[tuple[str, float], ...] = (("product", 1.0), ("pattern", 1.7))) -> Frontier:
    points = [point(f"{rule}-{k}", rule, k, worse * interpolated(k)) for rule, worse in rules for k in range(4, 17)]
    everything = marked([*points, *(point(f"top-{k}", "topk", 4 * k, kl) for k, kl in PLAIN.items())])
    provenance = {"moe_prism": "0.1.0", "seed": 0, "evaluation": {"text": "stdlib held-out", "tokens": 65536}, "devices": ["cpu"]}
    return Frontier(
        "prism-nano", "moe-prism/prism-nano", 4, tuple(everything[: len(points)]), tuple(everything[len(points) :]), provenance
    )


@pytest.fixture(scope="session")
def frontier() -> Frontier:
    return make_frontier()
