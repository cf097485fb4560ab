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
from ..store.decisions import Decisions
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
    prices, decisions = here.over(link) if link else here, Decisions(store.space, store.slots)
    for name, point in points.items():
        with operating_point(model, point=point), asked_planes(store) as asked:
            step = measure_step(model, windows, prompt, here)
        steps = windows.shape[1] - prompt
        groups, warm = _replayed_groups(asked.groups, steps, len(windows))
        slots = statistics.fmean(asked.slots[steps * store.space.layers :])
        for policy, eviction in policies.items():
            own = replace(eviction, group=store.group)
            misses, deciding = replayed(groups, store.space, store.slots, own, warm=warm), decisions.policy(own, groups)
            ways.append(PlaneForecast(name, policy, slots, step, misses.at(prices, step).with_deciding(deciding)))
    return prices, ways


def _replayed_groups(groups: list[Group], steps: int, texts: int) -> tuple[list[Group], int]:
    """The groups to replay of texts as `measure_step` decodes them, and how many steps only fill the cache.

    A short text pays for every plane that it asks for first. So the first of several texts fills the cache for the others. A single text
    was decoded twice: its second time is replayed.
    """
    if texts > 1:
        return groups, steps
    return [replace(group, step=group.step - steps) for group in groups[len(groups) // 2 :]], 0
