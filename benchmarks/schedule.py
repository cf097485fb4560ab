"""Scheduler cost per step, and policies compared on the same arrivals in the simulator.

    python benchmarks/schedule.py [--only cost,compare,capacity] [--cost cost.json] [--seconds 300] [--seeds 3] [--json]

cost: processor microseconds of one `step` with 256 running and 1,000 waiting requests; bar for `elastic`: 400 on average.
compare: goodput (requests/s that met all their targets), attainment and mean quality served, each policy on the same arrivals.
capacity: highest arrival rate at which 90 % of the requests meet all their targets.
Figures of the last two are simulated: a step lasts what the cost model says, times a random factor (10 %). Without `--cost` the model
is that of `default_cost`, for several slopes: the time of a token at a quarter of the slots as a share of that at all of them.
The ladder is that of prism-nano (`moe-prism frontier OUT --compare threshold --points 8`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_prism.forecast.step_cost import Coefficients
from moe_prism.point import FULL
from moe_prism.schedule import CostModel, Job, Ladder, LayerFacts, Level, Limits, Policy, Progress, policies
from moe_prism.schedule.classes import default_classes
from moe_prism.schedule.simulate import SimulatedEngine, simulate
from moe_prism.schedule.summary import Summary, by_class, summarise, window
from moe_prism.schedule.workloads import Arrival, generate

POINTS = ((3.11, 0.851), (3.95, 0.875), (5.04, 0.903), (6.44, 0.925), (8.14, 0.941), (10.30, 0.966), (12.84, 0.982), (16.0, 1.0))
LADDER = Ladder(tuple(Level(f"k{k:g}", FULL.with_budget(k / 16), k, quality) for k, quality in POINTS))
FACTS = LayerFacts(experts=32, parts=4, chosen=4)
SLOPES = (0.4, 0.6, 0.8)
ENGINE = SimulatedEngine(requests=64, tokens=512, cache=1 << 17)
COMPARED = ("fifo", "edf", "prism", "elastic")


def default_cost(slope: float) -> CostModel:
    """5 ms per step, 1 ms per decode token and 0.25 ms per prompt token at full budget; `slope` of a token's time is left at a quarter."""
    share = (1 - slope) / (1 - 0.25)
    fixed, per_slot = 1 - share, share / FACTS.slots
    return CostModel(FACTS, Coefficients(5e-3, 25e-5 * fixed, 1e-3 * fixed, 25e-5 * per_slot, 1e-3 * per_slot, 0.0, 0.0, 0.0))


# -- cost of the scheduler


def crowd(now: float, running: int, waiting: int) -> tuple[list[Progress], list[Progress]]:
    """Requests of all classes that run and wait; every request still has time left, which is the longest way through `elastic`."""
    arrivals = generate("chat", 50.0, 60.0, default_classes(), LADDER, seed=1)[: running + waiting]
    jobs = [Job(**(asdict(a.job) | {"arrival": now - 2 + 1e-3 * i, "ttft": a.job.ttft and 60.0})) for i, a in enumerate(arrivals)]
    busy = [Progress(job, job.prompt, 1 + i % 7, now - 0.01 * (i % 7), 0) for i, job in enumerate(jobs[:running])]
    return busy, [Progress(job) for job in jobs[running:]]


def scheduler_cost(name: str, steps: int, running: int = 256, waiting: int = 1000) -> dict[str, float]:
    """Processor microseconds per step: every step generates tokens, ends two requests, and brings two arrivals."""
    policy = policies.get(name)(LADDER, default_cost(0.6))
    now = 100.0
    busy, queue = crowd(now, running, waiting)
    limits = Limits(requests=running, tokens=2048)
    times = []
    for i in range(steps):
        began = time.process_time_ns()
        works = policy.step(now, queue, busy, limits)
        times.append((time.process_time_ns() - began) / 1e3)
        now += 0.02
        busy, queue = _advance(policy, busy, queue, {work.id: work.tokens for work in works}, now, i)
    times = times[steps // 10 :]
    return {
        "least": min(times),
        "mean": statistics.fmean(times),
        "p50": statistics.median(times),
        "p99": sorted(times)[int(0.99 * len(times))],
    }


def _advance(
    policy: Policy, busy: list[Progress], queue: list[Progress], works: dict[str, int], now: float, i: int
) -> tuple[list[Progress], list[Progress]]:
    """Two of the oldest end; who was given work advances; two requests arrive."""
    after = [_moved(p, works[p.job.id], now) if p.job.id in works else p for p in busy[2:]]
    after += [_moved(p, works[p.job.id], now) for p in queue if p.job.id in works]
    new = [Job(**(asdict(queue[-1].job) | {"id": f"n{i}.{j}", "arrival": now, "output": 200})) for j in range(2)]
    return after, [p for p in queue if p.job.id not in works] + [Progress(job) for job in new]


def _moved(p: Progress, tokens: int, now: float) -> Progress:
    if p.computed < p.job.prompt:
        computed = p.computed + tokens
        done = int(computed == p.job.prompt)
        return Progress(p.job, computed, done, now if done else None, 0)
    return Progress(p.job, p.computed, p.generated + 1, p.first_token, 0)


# -- policies in the simulator


@dataclass(frozen=True)
class Setting:
    """One comparison: its arrivals and what steps cost."""

    cost: CostModel
    workload: str
    spread: float  # of floors drawn per request; 0: the classes' floors
    seconds: float

    def arrivals(self, rate: float, seed: int) -> list[Arrival]:
        return generate(self.workload, rate, self.seconds, default_classes(), LADDER, seed, spread=self.spread)

    def run(self, name: str, rate: float, seed: int, **options: Any) -> tuple[Summary, dict[str, Summary]]:
        """One replay; figures over the requests that arrived after the first and before the last tenth."""
        believed = CostModel(self.cost.facts, self.cost.coefficients)
        policy = policies.get(name)(LADDER, believed, **options)
        run = simulate(
            self.arrivals(rate, seed), policy, self.cost, LADDER, ENGINE, self.seconds, noise=0.1, seed=seed, believed=believed
        )
        results = window(run, 0.1 * self.seconds, 0.9 * self.seconds)
        span = 0.8 * self.seconds
        return summarise(results, span), {kind: summarise(r, span) for kind, r in by_class(results).items()}


def compare(setting: Setting, rate: float, seeds: int) -> list[dict[str, Any]]:
    """Every policy on the same arrivals, then `elastic` asked for at least the mean quality that `prism` served."""
    rows = [_row(setting, name, rate, seeds) for name in COMPARED]
    prism = next(row for row in rows if row["policy"] == "prism")
    rows.append(_row(setting, "elastic", rate, seeds, quality=min(prism["quality"] + 0.005, 1.0)))
    rows[-1]["policy"] = "elastic at prism's quality"
    for row in rows:
        row["vs fifo"], row["vs prism"] = row["goodput"] / rows[0]["goodput"], row["goodput"] / prism["goodput"]
    return rows


def _row(setting: Setting, name: str, rate: float, seeds: int, **options: Any) -> dict[str, Any]:
    runs = [setting.run(name, rate, seed, **options) for seed in range(seeds)]
    row: dict[str, Any] = {"policy": name, "rate": rate}
    for key in ("goodput", "attainment", "quality", "throughput"):
        row[key] = statistics.fmean(getattr(total, key) for total, _ in runs)
    for kind in runs[0][1]:
        row[kind] = statistics.fmean(classes[kind].attainment for _, classes in runs)
    return row


def capacity(setting: Setting, name: str, seeds: int, share: float = 0.9, **options: Any) -> dict[str, Any]:
    """Bisection between 2 and 40 requests/s, to 2 %; with the mean quality served there."""
    low, high, quality = 2.0, 40.0, float("nan")
    while high / low > 1.02:
        rate = (low * high) ** 0.5
        row = _row(setting, name, rate, seeds, **options)
        if row["attainment"] >= share:
            low, quality = rate, row["quality"]
        else:
            high = rate
    return {"policy": name, "rate": low, "quality": quality}


def capacities(setting: Setting, seeds: int) -> list[dict[str, Any]]:
    """Of every policy, and of `elastic` asked for at least the mean quality that `prism` serves at its own capacity."""
    rows = [capacity(setting, name, seeds) for name in COMPARED]
    prism = next(row for row in rows if row["policy"] == "prism")
    rows.append(capacity(setting, "elastic", seeds, quality=min(prism["quality"] + 0.005, 1.0)))
    rows[-1]["policy"] = "elastic at prism's quality"
    for row in rows:
        row["vs fifo"], row["vs prism"] = row["rate"] / rows[0]["rate"], row["rate"] / prism["rate"]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> None:
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |")
    print("|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="cost,compare", help="of: cost, compare, capacity")
    parser.add_argument("--cost", type=Path, help="a measured cost model (JSON)")
    parser.add_argument("--rates", default="10,12,14,16", help="requests/s of `compare`")
    parser.add_argument("--workloads", default="chat", help="of: chat, burst, classes, longtail")
    parser.add_argument("--spreads", default="0,0.15", help="of floors drawn per request; 0 keeps the classes' floors")
    parser.add_argument("--slopes", default=",".join(map(str, SLOPES)))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    only, report = options.only.split(","), {}
    if "cost" in only:
        report["microseconds per step"] = [{"policy": n} | scheduler_cost(n, options.steps) for n in policies.names()]
    costs = {str(options.cost): CostModel.load(options.cost)} if options.cost else {}
    costs = costs or {f"slope {slope}": default_cost(float(slope)) for slope in options.slopes.split(",")}
    for label, cost in costs.items():
        for workload in options.workloads.split(","):
            for spread in map(float, options.spreads.split(",")):
                setting = Setting(cost, workload, spread, options.seconds)
                title = f"{label}, {workload}, " + (f"floors drawn with spread {spread:g}" if spread else "floors of the classes")
                if "compare" in only:
                    rows = [row for rate in options.rates.split(",") for row in compare(setting, float(rate), options.seeds)]
                    report[title] = rows
                if "capacity" in only:
                    report[f"capacity: {title}"] = capacities(setting, options.seeds)
    if options.json:
        print(json.dumps(report))
        return
    for title, rows in report.items():
        print(f"\n{title}\n")
        table(rows)


if __name__ == "__main__":
    main()
