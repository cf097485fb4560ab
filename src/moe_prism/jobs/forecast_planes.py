"""What a token over records of planes will cost: a text is decoded at every point, and what its steps asked for is replayed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..elastic import operating_point
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
        uncounted = filling(asked.prompts)
        slots = statistics.fmean(asked.slots)
        for policy, eviction in policies.items():
            own = replace(eviction, group=store.group)
            deciding = decisions.policy(own, asked.groups)
            misses = replayed(asked.groups, store.space, store.slots, own, uncounted=uncounted)
            ways.append(PlaneForecast(name, policy, slots, step, misses.at(prices, step).with_deciding(deciding)))
    return prices, ways


def filling(prompts: Sequence[int]) -> set[int]:
    """Steps that fill the cache and are not counted: prompts, and all of the first half of the texts, as `measure_step` decodes them.

    A cache that begins empty pays for every plane that is asked for first, which a longer run no longer does. A prompt begins a text, and
    brings in much of what its steps want.
    """
    return {*range(prompts[len(prompts) // 2]), *prompts}
