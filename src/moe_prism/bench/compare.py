"""Every policy against the same arrivals: on the real server, in turn, and in the simulator."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..schedule import CostModel, policies
from ..schedule.simulate import Engine
from ..serve.config import Config, load_config
from .environment import environment, load
from .load import Run, warm_up
from .prompts import Cut, cut_tokens
from .result import run_result
from .servers import PolicyChoice, Server, serving, settings
from .simulated import LOAD, capacity, simulated
from .single import UNLOADED, offered
from .target import Target, find_target
from .workload import Offer, Workload

FIGURES = ("goodput", "attainment", "quality", "output_tokens_per_second")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """rates empty: one near the saturation of fifo. cost: load this cost model instead of measuring one."""

    policies: Sequence[str] = ("fifo", "prism", "elastic")
    rates: Sequence[float] = ()
    load: float = LOAD
    repeats: int = 3
    seed: int = 0
    patience: float = 30.0
    cost: Path | None = None
    save_cost: Path | None = None
    probe_seconds: float = 8.0
    config: Path | None = None

    def check(self) -> list[PolicyChoice]:
        """UsageError for a wrong option; else the policies."""
        chosen = [PolicyChoice.parse(text) for text in self.policies]
        for policy in chosen:
            policies.get(policy.name)  # an unknown name is told before anything starts
        if not chosen or len({p.label for p in chosen}) != len(chosen):
            raise UsageError("--policies must name each policy once", "write fifo,prism,elastic")
        if not 1 <= self.repeats <= 100:
            raise UsageError(f"--repeats {self.repeats} is out of range", "give 1 to 100")
        if not 0.05 <= self.load <= 20:
            raise UsageError(f"--load {self.load:g} is out of range", "give 0.05 to 20")
        return chosen


@dataclass(frozen=True)
class Bench:
    """Servers that are up, and what is offered to them."""

    targets: dict[str, Target]
    choices: Sequence[PolicyChoice]
    workload: Workload
    options: Options
    cost: CostModel
    engine: Engine
    cut: Cut


def compare(folder: Path, offer: Offer, options: Options, tell: Tell) -> tuple[dict[str, Any], list[tuple[str, Run]]]:
    """Measure and simulate. Returns the result as JSON, and the measured runs by name. tell: hears of progress, line by line."""
    chosen = options.check()
    config = load_config(options.config)
    workload = offer.of(config.classes)
    before = environment()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-prism-bench-")))
        cost_file = options.cost or scratch / "cost.json"
        servers: dict[str, Server] = {}
        for i, policy in enumerate(chosen):
            tell(f"starting the server of {policy.label}")
            arguments = ["--probe-seconds", str(options.probe_seconds)]
            arguments += ["--cost" if options.cost or i else "--save-cost", str(cost_file)]
            servers[policy.label] = stack.enter_context(
                serving(folder, settings(config, workload.classes, policy), arguments, scratch, f"server{i}")
            )
        cost = CostModel.load(cost_file)
        if options.save_cost:
            cost.save(options.save_cost)
        result, runs = asyncio.run(_measure(folder, servers, chosen, workload, options, cost, config, tell))
    return {"kind": "policies", "environment": before, "load_after": load(), **result}, runs


async def _measure(
    folder: Path,
    servers: dict[str, Server],
    chosen: Sequence[PolicyChoice],
    workload: Workload,
    options: Options,
    cost: CostModel,
    config: Config,
    tell: Tell,
) -> tuple[dict[str, Any], list[tuple[str, Run]]]:
    targets = {label: await find_target(server.url) for label, server in servers.items()}
    size = config.engine
    engine = Engine(size.requests, size.step_tokens, size.cache_tokens)
    bench = Bench(targets, chosen, workload, options, cost, engine, cut_tokens(folder))
    warm = bench.cut(UNLOADED, random.Random(0))  # noqa: S311
    unloaded = {label: await warm_up(target, warm) for label, target in targets.items()}
    first = next(iter(targets.values()))
    rates = list(options.rates)
    if not rates:
        found = capacity(workload, PolicyChoice.parse("fifo"), cost, first.ladder, engine, first.context, options.seed)
        rates = [round(found * options.load, 3)]
        tell(f"fifo's capacity in the simulator: {found:.2f} requests/s; offered: {rates[0]:g}")
    runs: list[tuple[str, Run]] = []
    rows = []
    for rate in rates:
        made = await _at(bench, rate, runs, tell)
        rows.append({"rate": rate, "policies": made, "ratios": ratios(made, [p.label for p in chosen])})
    return {
        "model": str(folder),
        "operating_points": [asdict(level) for level in first.ladder.levels],
        "workload": workload.described(),
        "engine": asdict(engine),
        "cost": cost.to_json(),
        "unloaded": unloaded,
        "repeats": options.repeats,
        "rates": rows,
    }, runs


async def _at(bench: Bench, rate: float, runs: list[tuple[str, Run]], tell: Tell) -> dict[str, dict[str, Any]]:
    """Every policy at one rate: repeat by repeat, each repeat in another order, all policies on the repeat's arrivals."""
    real: dict[str, list[dict[str, Any]]] = {p.label: [] for p in bench.choices}
    replay: dict[str, list[dict[str, Any]]] = {p.label: [] for p in bench.choices}
    options = bench.options
    for repeat in range(options.repeats):
        shift = repeat % len(bench.choices)
        for policy in (*bench.choices[shift:], *bench.choices[:shift]):
            target = bench.targets[policy.label]
            seed = options.seed + repeat
            run, about = await offered(target, bench.workload, rate, seed, bench.cut, "class", options.patience)
            found = {**about, **run_result(run, target.ladder)}
            real[policy.label].append(found)
            runs.append((f"{policy.label} rate {rate:g} seed {seed}", run))
            replay[policy.label].append(_replayed(bench, policy, rate, seed))
            tell(_line(policy.label, repeat, found, replay[policy.label][-1]))
    return {label: {"real": real[label], "simulated": replay[label]} for label in real}


def _replayed(bench: Bench, policy: PolicyChoice, rate: float, seed: int) -> dict[str, Any]:
    target = bench.targets[policy.label]
    arrivals = bench.workload.arrivals(rate, seed, target.ladder, target.context)
    run = simulated(arrivals, policy, bench.cost, target.ladder, bench.engine, bench.workload.seconds, bench.options.patience)
    return run_result(run, target.ladder)


def _line(label: str, repeat: int, real: dict[str, Any], replay: dict[str, Any]) -> str:
    void = "; VOID: " + real["void"][0] if real["void"] else ""
    return f"{label} {repeat + 1}: goodput {real['goodput']:.2f} requests/s, simulated {replay['goodput']:.2f}{void}"


def ratios(made: dict[str, dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Per policy: each figure to that of `fifo` and of `prism` on the same arrivals, and the simulator's to the server's."""
    out: dict[str, Any] = {}
    for label in labels:
        row: dict[str, Any] = {}
        for base in ("fifo", "prism"):
            if base in made and base != label:
                row[f"to {base}"] = {f: _spread(made[label]["real"], made[base]["real"], f) for f in FIGURES}
        row["simulated to real"] = {f: _spread(made[label]["simulated"], made[label]["real"], f) for f in FIGURES}
        out[label] = row
    return out


def _spread(above: Sequence[dict[str, Any]], below: Sequence[dict[str, Any]], figure: str) -> dict[str, float | None]:
    """Median, least and most of the ratios, repeat by repeat; None where nothing can be divided."""
    pairs = [(a[figure], b[figure]) for a, b in zip(above, below, strict=True)]
    found = [a / b for a, b in pairs if a is not None and b]
    if not found:
        return {"median": None, "least": None, "most": None}
    return {"median": float(np.median(found)), "least": min(found), "most": max(found)}
