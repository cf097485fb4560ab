"""Experts of a training that stay, move or are copied for an iteration (Hecate), on recorded routing: bytes and who waits for whom.

    python benchmarks/hecate.py [TRACE] [--devices 8] [--tokens 256] [--share 0,0.125,0.25,0.5,1] [--period 10] [--json]

TRACE is a file of `moe-prism trace`, by default the shipped one of nano. Its tokens, in their order, are cut into iterations: text changes
from one file to the next, so loads drift. Bytes are in experts: 1 is the weights of one expert. Counted, not measured: no device is used.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from moe_prism.cli.output import table
from moe_prism.offload import load_trace
from moe_prism.placement.hecate import TrainingCluster, Way, loads_of, simulate_training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", default="nano")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--share", default="0,0.125,0.25,0.5,1")
    parser.add_argument("--period", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    trace = load_trace(args.trace)
    load = loads_of(trace.expert_ids, trace.experts, args.tokens)
    rows: list[dict[str, Any]] = []
    for share in map(float, args.share.split(",")):
        cluster = TrainingCluster(devices=args.devices, share=share, period=args.period)
        ways: tuple[Way, ...] = ("eplb", "hecate") if share else ("static", "hecate")
        rows += [{"way": way, "share": share, **simulate_training(load, cluster, way).to_json()} for way in ways]
    if args.json:
        print(json.dumps({"benchmark": "hecate", "iterations": len(load), "rows": rows}))
        return
    cells = [[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    print(f"{len(load)} iterations of {args.tokens} tokens\n{table(list(rows[0]), cells)}")


if __name__ == "__main__":
    main()
