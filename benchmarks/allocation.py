"""One level for every expert under one budget: time of hull greedy, dynamic program and HiGHS as ratios in one run, and their value gaps.

    python benchmarks/allocation.py [--items 1024,6144] [--choices 4] [--budgets 100] [--repeats 3] [--limit 60] [--json]

Losses are sums of random gains in no particular order, so hulls skip choices; costs are 1, 2, ... units and the budget is half of the
range. `greedy` is one call of `hull_greedy`, `frontier` the path with all of its budgets read off. HiGHS is scipy's `milp` at its default
gap, stopped after `limit` seconds. Seconds are CPU seconds, so a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, kron

from moe_prism.frontier import exact, greedy_path, hull_greedy, lp_bound


def table(items: int, choices: int, seed: int) -> np.ndarray:
    """Curves [items, choices, 2]: losses fall by random gains, some items matter much more than others."""
    rng = np.random.default_rng(seed)
    gains = rng.exponential(size=(items, choices - 1)) * rng.lognormal(sigma=1.5, size=(items, 1))
    losses = np.cumsum(np.c_[np.zeros(items), gains], axis=1)[:, ::-1]
    return np.stack([np.broadcast_to(np.arange(1.0, choices + 1), losses.shape), losses], axis=2)


def highs(curves: np.ndarray, budget: float, limit: float) -> float:
    """Loss by integer programming; nan where none was found in time."""
    items, choices = curves.shape[:2]
    one = kron(eye_array(items), np.ones((1, choices)), format="csr")
    rows = [LinearConstraint(one, 1, 1), LinearConstraint(csr_array(curves[..., 0].reshape(1, -1)), ub=budget)]
    found = milp(
        curves[..., 1].ravel(),
        constraints=rows,
        bounds=Bounds(0, 1),
        integrality=np.ones(items * choices),
        options={"time_limit": limit},
    )
    return float(found.fun) if found.fun is not None else float("nan")


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    value = function()
    return time.process_time() - began, value


def case(items: int, args: argparse.Namespace) -> dict[str, Any]:
    curves = table(items, args.choices, seed=items)
    low, high = items, items * args.choices
    budget = (low + high) // 2
    budgets = np.linspace(low, high, args.budgets)

    def frontier() -> np.ndarray:
        path = greedy_path(curves)
        return path.losses[np.searchsorted(path.costs, budgets, side="right") - 1]

    runs: dict[str, Callable[[], Any]] = {
        "greedy": lambda: hull_greedy(curves, budget).loss,
        "frontier": frontier,
        "dp": lambda: exact(curves, budget).loss,
        "highs": lambda: highs(curves, budget, args.limit),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, Any] = {}
    for _ in range(args.repeats):  # alternating, so that all see the same machine
        for name, run in runs.items():
            took, values[name] = timed(run)
            seconds[name].append(took)
    middle = {name: statistics.median(took) for name, took in seconds.items()}
    bound = lp_bound(curves, budget)
    return {
        "items": items,
        "choices": args.choices,
        "milliseconds": {name: round(1000 * took, 3) for name, took in middle.items()},
        "ratio": {name: round(middle[name] / middle["greedy"], 1) for name in runs},
        "gap_to_bound": {name: values[name] / bound - 1 for name in ("greedy", "dp", "highs")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", default="1024,6144")
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--budgets", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [case(int(items), args) for items in args.items.split(",")]
    if args.json:
        print(json.dumps({"benchmark": "allocation", "rows": rows}))
        return
    for row in rows:
        print(f"{row['items']} items x {row['choices']} choices, greedy {row['milliseconds']['greedy']:.2f} ms")
        for name, ratio in row["ratio"].items():
            gap = row["gap_to_bound"].get(name)
            print(f"  {name:9} {ratio:9.1f} x greedy" + ("" if gap is None else f", loss {gap:+.2e} above the bound"))


if __name__ == "__main__":
    main()
