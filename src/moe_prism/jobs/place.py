"""Place experts or their blocks on devices, and replay what that costs on text that the placement was not made for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import replace_file
from ..offload.replay import interleave
from ..offload.trace import Trace, load_trace
from ..options.placement import PlaceOptions
from ..placement import Cluster, ExpertPlacement, PlacementCost, demand_of, mixed, placements, simulate
from ..result import Result


@dataclass(frozen=True)
class PlacementFound(Result):
    """A placement, and what it and the engine's default cost on the trace's evaluation side."""

    placement: ExpertPlacement
    options: PlaceOptions
    costs: dict[str, PlacementCost]
    """policy -> cost; the chosen one, and `contiguous`."""

    def to_json(self) -> dict[str, Any]:
        costs = {name: cost.to_json() for name, cost in self.costs.items()}
        return {"policy": self.options.policy, "of": self.placement.grain, "devices": self.options.devices, "costs": costs}

    def to_records(self) -> list[dict[str, Any]]:
        """A row per policy."""
        return [{"policy": name, **cost.to_json()} for name, cost in self.costs.items()]

    def save(self, path: str | Path) -> None:
        """The file that SGLang's `--init-expert-location` takes: no key but the map."""
        replace_file(Path(path), json.dumps({"physical_to_logical_map": self.placement.slots.tolist()}).encode() + b"\n")


def place_experts(
    trace: str | Path | Trace, out: str | Path | None = None, options: PlaceOptions | None = None, *, force: bool = False
) -> PlacementFound:
    """Which device holds which expert, from the calibration side of a trace; judged on its evaluation side, in decode steps.

    Written to `out` unless that is None. Raises UsageError for a room that does not divide evenly, or an existing `out`.

    >>> import moe_prism
    >>> found = moe_prism.place_experts("nano", options=moe_prism.PlaceOptions(devices=4, policy="eplb"))
    >>> found.costs["eplb"].straggler < found.costs["contiguous"].straggler
    True
    """
    options = options or PlaceOptions()
    options.check()
    if out is not None and Path(out).exists() and not force:
        raise UsageError(f"'{out}' exists", "choose another path, or --force")
    found = trace if isinstance(trace, Trace) else load_trace(trace)
    room = Cluster(devices=options.devices, spare=options.spare, nodes=options.nodes, link=options.link)
    room.check(found.experts)
    demand = demand_of(mixed(found.part("calibration"), options.full_share))
    rows = interleave(mixed(found.part("evaluation").decode(), options.full_share), options.batch)
    made = {name: placements.get(name)(demand, room) for name in dict.fromkeys((options.policy, "contiguous"))}
    result = PlacementFound(made[options.policy], options, {name: simulate(rows, each) for name, each in made.items()})
    if out is not None:
        result.save(out)
    return result
