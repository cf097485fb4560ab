"""Placement policies on recorded routing: the slowest device of a step, and what crosses the wire, with and without dropped slots.

    python benchmarks/placement.py [TRACE] [--devices 8] [--spare 0,8] [--batch 12] [--json]

TRACE is a file of `moe-prism trace`, by default the shipped one of nano at half its slots. Policies see its calibration side and are
judged on decode steps of its evaluation side; `own side` is what they were made for. Times are in tokens of a whole expert, counted,
not measured: no device is used.
"""

from __future__ import annotations

import argparse
import json
from time import perf_counter
from typing import Any

from moe_prism.cli.output import table
from moe_prism.offload import load_trace
from moe_prism.offload.replay import interleave
from moe_prism.placement import Cluster, demand_of, mixed, placements, simulate


def measured(trace: Any, devices: int, spare: int, batch: int, full_share: float) -> list[dict[str, Any]]:
    """A row per policy."""
    fitting = mixed(trace.part("calibration"), full_share)
    rows = interleave(mixed(trace.part("evaluation").decode(), full_share), batch)
    demand, found = demand_of(fitting), []
    for name in placements.names():
        start = perf_counter()
        placement = placements.get(name)(demand, Cluster(devices=devices, spare=spare))
        seconds = perf_counter() - start
        own, cost = placement.loads(demand), simulate(rows, placement)
        found.append(
            {
                "policy": name,
                "own side": float(own.max(1).sum() / own.mean(1).sum()),
                "all steps": cost.largest / cost.even,
                "a step": cost.straggler,
                "even": cost.even,
                "sends": cost.sends,
                "at home": cost.at_home,
                "seconds": seconds,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", default="nano")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--spare", default="0,8")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    trace, result = load_trace(args.trace), {}
    for full_share, name in ((0.0, "as recorded"), (1.0, "full budget")):
        for spare in map(int, args.spare.split(",")):
            rows = measured(trace, args.devices, spare, args.batch, full_share)
            result[f"{name}, {spare} spare slots"] = rows
    if args.json:
        print(json.dumps({"benchmark": "placement", **result}))
        return
    for title, rows in result.items():
        cells = [[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
        print(f"\n{title}\n{table(list(rows[0]), cells)}")


if __name__ == "__main__":
    main()
