"""What the order of loads (D2MoE) and of requests (Read-ME) is worth on a model's routing. Neither is in a store or a scheduler.

    python benchmarks/orders.py [--trace nano] [--share 0.25] [--batches 1 4 16] [--prices .01 .1 1] [--json]

`loads` replays a trace through `lfu` with a part of the sub-experts in memory. A layer's misses are loaded one after the other, each
takes 1; a token's work on one of them takes `price`. In time over the larger of all loading and all work: `await`, when all work on what
is missing comes after the last load, as a store has it; `number` and `hottest`, when it comes as records arrive, in these orders.
`requests` has tokens of 16 requests, of which a step takes 8 at most, with their true routing known: distinct experts per step in the
order of arrival and grouped, the longest wait, and the experts that are read for all 16 in two steps and in one. The trace is a
sequence of decode steps of single requests; batches take one token of each request at a time. Nothing here measures time.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from group_requests import distinct, fill_batches, longest_wait
from load_order import by_number, hottest_first, makespan

from moe_prism.cli.output import table
from moe_prism.offload import Trace, cache_policies, load_trace
from moe_prism.offload.replay import ReplayOptions, groups, interleave, make_cache, serve

WAITING, LIMIT = 16, 8


def loads(trace: Trace, share: float, batches: list[int], prices: list[float]) -> list[dict[str, Any]]:
    """A row per batch size and price."""
    found = []
    for batch in batches:
        rows = interleave(trace, batch)
        space = rows.sub_space
        slots = max(1, round(share * len(space) / space.layers))
        cache = make_cache(cache_policies.get("lfu"), space, slots, ReplayOptions(space=space))
        wanted = [(group, _missing(serve(cache, group, space.layers)), _uses(rows, group)) for group in groups(rows, space)]
        for price in prices:
            sums = dict.fromkeys(("least", "await", "number", "hottest"), 0.0)
            for _, missing, uses in wanted:
                counts = [[uses[key]] for key in missing]
                if not counts:
                    continue
                work = price * sum(count for (count,) in counts)
                sums["least"] += max(len(counts), work)
                sums["await"] += len(counts) + work
                sums["number"] += makespan(by_number(counts), counts, [1.0], [price])
                sums["hottest"] += makespan(hottest_first(counts), counts, [1.0], [price])
            misses = sum(len(missing) for _, missing, _ in wanted)
            least = sums.pop("least")
            row = {"batch": batch, "price": price, "misses_per_layer": misses / len(wanted)}
            found.append(row | {name: value / least for name, value in sums.items()})
    return found


def _missing(served: list[Any]) -> list[int]:
    """Keys that were loaded or passed through, ascending."""
    return sorted({*(load.key for one in served for load in one.loads), *(key for one in served for key in one.bypassed)})


def _uses(trace: Trace, group: Any) -> dict[int, int]:
    """Tokens of a group that use each of its keys."""
    space = trace.sub_space
    ids = trace.expert_ids[group.first_row : group.last_row, group.layer].astype(np.int64)
    whole = np.full(ids.shape, (1 << space.parts) - 1) if trace.kept is None else None
    kept = whole if whole is not None else trace.kept[group.first_row : group.last_row, group.layer]  # type: ignore[index]
    on = ((kept[..., None] >> np.arange(space.parts)) & 1).astype(bool) & (ids >= 0)[..., None]
    keys = ((ids + group.layer * space.experts)[..., None] * space.parts + np.arange(space.parts))[on]
    names, counts = np.unique(keys, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def requests(trace: Trace) -> list[dict[str, Any]]:
    """Distinct (layer, expert) pairs of steps in three ways, mean over the trace."""
    rows = interleave(trace, WAITING)
    bounds = np.flatnonzero(np.r_[True, np.diff(rows.step) != 0, True])
    arrival, grouped, both, waits = [], [], [], []
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if last - first < WAITING:
            continue
        ids = rows.expert_ids[first:last].astype(np.int64) + np.arange(rows.layers)[:, None] * rows.experts
        wanted = [set(own.reshape(-1).tolist()) for own in ids]
        arrival.append(distinct([range(LIMIT), range(LIMIT, WAITING)], wanted))
        batches = fill_batches(wanted, LIMIT, window=WAITING)
        grouped.append(distinct(batches, wanted))
        waits.append(longest_wait(batches))
        both.append(distinct([range(WAITING)], wanted))
    names = {"arrival": np.mean(arrival), "grouped": np.mean(grouped)}
    reads = {"two steps, grouped": 2 * np.mean(grouped), "one step": np.mean(both)}
    row = {**names, "ratio": np.mean(grouped) / np.mean(arrival), **reads, "longest wait": max(waits), "steps": len(both)}
    return [{name: float(value) for name, value in row.items()}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="nano")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prices", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    trace = load_trace(args.trace).decode()
    found = {"loads": loads(trace, args.share, args.batches, args.prices), "requests": requests(trace)}
    if args.json:
        print(json.dumps({"benchmark": "orders", "arguments": vars(args), **found}))
        return
    for name, rows in found.items():
        cells = [[f"{value:.3f}" if isinstance(value, float) else value for value in row.values()] for row in rows]
        print(f"\n{name}\n{table(list(rows[0]), cells)}")


if __name__ == "__main__":
    main()
