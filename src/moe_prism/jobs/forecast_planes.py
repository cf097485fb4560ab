"""What a token over records of planes will cost: a text is decoded at every point, and what its steps asked for is replayed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..elastic import operating_point
from ..offload.replay import Group
from ..point import OperatingPoint
from ..store.plane_store import PlaneStore
from ..store.pools import Eviction
from ..store.price_planes import asked_planes, measure_plane_prices
from ..store.price_reads import Forecast, ReadPrices, measure_step, replayed


@dataclass(frozen=True)
class PlaneForecast:
    """A named point under a policy. slots: kept per token and layer; step: seconds apart from reads; found: with them."""

    name: str
    policy: str
    slots: float
    step: float
    found: Forecast


def forecast_planes(
    model: Any, windows: Tensor, prompt: int, policies: Mapping[str, Eviction], points: Mapping[str, OperatingPoint], link: float
) -> tuple[ReadPrices, list[PlaneForecast]]:
    """The prices of planes, and every point under every policy.

    windows [B, n]: tokens, of which the first `prompt` are no decode steps; link: seconds that a slower link takes for a record, else 0.
    """
    store: PlaneStore = model._moe_prism.store
    here, ways = measure_plane_prices(store), []
    prices = here.over(link) if link else here
    for name, point in points.items():
        with operating_point(model, point=point), asked_planes(store) as asked:
            step = measure_step(model, windows, prompt, here)
        groups, warm = _once(asked.groups, windows.shape[1] - prompt, len(windows))
        slots = statistics.fmean(asked.slots[(windows.shape[1] - prompt) * store.space.layers :])
        for policy, eviction in policies.items():
            misses = replayed(groups, store.space, store.slots, replace(eviction, group=store.group), warm=warm)
            ways.append(PlaneForecast(name, policy, slots, step, misses.at(prices, step)))
    return prices, ways


def _once(groups: list[Group], steps: int, texts: int) -> tuple[list[Group], int]:
    """The groups of every text once, of which the first is decoded twice, and how many steps only fill the cache.

    A short text pays for every plane that it asks for first. So the first of several texts fills the cache for the others.
    """
    one = steps * (len(groups) // (steps * (texts + 1)))
    if texts == 1:
        return [replace(group, step=group.step - steps) for group in groups[one:]], 0
    return groups[:one] + [replace(group, step=group.step - steps) for group in groups[2 * one :]], steps
