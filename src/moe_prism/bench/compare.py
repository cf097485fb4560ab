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
from ..options.bench import CompareOptions, Offer
from ..schedule import CostModel, policies
from ..schedule.simulate import SimulatedEngine
from ..serve.config import load_config
from ..serve.server import check_folder, need_packages
from .environment import environment, load
from .load import LoadRun, warm_up
from .prompts import Cut, cut_tokens
from .result import Benchmark, run_result
from .servers import PolicyChoice, ServerProcess, serving, settings
from .simulated import SimulatedServer, capacity, simulated
from .single import UNLOADED, Asked, offered
from .target import Target, find_target
from .workload import Workload

FIGURES = ("goodput", "attainment", "quality", "output_tokens_per_second")
Tell = Callable[[str], None]


def check_options(options: CompareOptions) -> list[PolicyChoice]:
    """UsageError for a wrong option; else the policies."""
    options.check()
    chosen = [PolicyChoice.parse(text) for text in options.policies]
    for policy in chosen:
        policies.get(policy.name)  # an unknown name is told before anything starts
    if not chosen or len({p.label for p in chosen}) != len(chosen):
        raise UsageError("--policies must name each policy once", "write fifo,prism,elastic")
    return chosen


@dataclass(frozen=True, kw_only=True)
class PolicyComparison:
    """What is compared: policies, each on a server of this size, and what is offered to them."""

    folder: Path
    choices: Sequence[PolicyChoice]
    workload: Workload
    options: CompareOptions
    engine: SimulatedEngine
    tell: Tell


@dataclass(frozen=True, kw_only=True)
class Bench(PolicyComparison):
    """With the servers up."""

    targets: dict[str, Target]
    cut: Cut


@dataclass
class Measured:
    """One rate: what each policy's server made of it, repeat by repeat."""

    rate: float
    real: dict[str, list[dict[str, Any]]]


def bench_policies(folder: str | Path, offer: Offer, options: CompareOptions, tell: Tell = lambda _line: None) -> Benchmark:
    """Measure scheduling policies on servers of an elastic folder, one each, and in the simulator. tell: hears of progress by lines.

    Raises UsageError for a policy that there is not, or a folder that cannot be served.

    >>> import moe_prism
    >>> asked = moe_prism.CompareOptions(policies=("fifo", "elastic"), rates=(4.0,), repeats=1, probe_seconds=2.0)
    >>> found = moe_prism.bench_policies("elastic", moe_prism.Offer(name="chat", seconds=4), asked)
    >>> sorted(row["policy"] for row in found.to_records())
    ['elastic', 'fifo']
    """
    folder = Path(folder)
    check_folder(folder)
    need_packages()
    chosen = check_options(options)
    config = load_config(options.config)
    size = config.engine
    compared = PolicyComparison(
        folder=folder,
        choices=chosen,
        workload=Workload.of(offer, config.classes),
        options=options,
        engine=SimulatedEngine(size.requests, size.step_tokens, size.cache_tokens),
        tell=tell,
    )
    before = environment()
    with tempfile.TemporaryDirectory(prefix="moe-prism-bench-") as scratch:
        place = Path(scratch)
        cost_file = options.cost or place / "cost.json"
        learned = {policy.label: place / f"learned{i}.json" for i, policy in enumerate(chosen)}
        with contextlib.ExitStack() as stack:
            servers: dict[str, ServerProcess] = {}
            for i, policy in enumerate(chosen):
                tell(f"starting the server of {policy.label}")
                arguments = ["--probe-seconds", str(options.probe_seconds), "--save-cost", str(learned[policy.label])]
                arguments += ["--cost", str(cost_file)] if options.cost or i else []
                servers[policy.label] = stack.enter_context(
                    serving(folder, settings(config, compared.workload.classes, policy), arguments, place, f"server{i}")
                )
                if not (options.cost or i):
                    CostModel.load(learned[policy.label]).save(cost_file)  # the one that all begin with
            cost = CostModel.load(cost_file)
            if options.save_cost:
                cost.save(options.save_cost)
            bench, unloaded, found, runs = asyncio.run(_measure(compared, servers, cost))
        costs = {label: CostModel.load(path) for label, path in learned.items()}
    first = next(iter(bench.targets.values()))
    result = {
        "kind": "policies",
        "environment": before,
        "load_after": load(),
        "model": str(folder),
        "operating_points": [level.to_json() for level in first.ladder.levels],
        "workload": compared.workload.described(),
        "engine": asdict(compared.engine),
        "cost": cost.to_json(),
        "unloaded": unloaded,
        "repeats": options.repeats,
        "rates": [_row(bench, measured, costs) for measured in found],
    }
    return Benchmark(result, runs)


async def _measure(
    compared: PolicyComparison, servers: dict[str, ServerProcess], cost: CostModel
) -> tuple[Bench, dict[str, Any], list[Measured], list[tuple[str, LoadRun]]]:
    targets = {label: await find_target(server.url) for label, server in servers.items()}
    bench = Bench(**vars(compared), targets=targets, cut=cut_tokens(compared.folder))
    options = bench.options
    warm = bench.cut(UNLOADED, random.Random(0))  # noqa: S311
    unloaded = {label: await warm_up(target, warm) for label, target in targets.items()}
    first = next(iter(targets.values()))
    rates = list(options.rates)
    if not rates:
        fifo = _simulated_server(bench, PolicyChoice.parse("fifo"), cost, first)
        found = capacity(bench.workload, fifo, options.seed)
        rates = [round(found * options.load, 3)]
        bench.tell(f"fifo's capacity in the simulator: {found:.2f} requests/s; offered: {rates[0]:g}")
    runs: list[tuple[str, LoadRun]] = []
    return bench, unloaded, [await _at(bench, rate, runs) for rate in rates], runs


async def _at(bench: Bench, rate: float, runs: list[tuple[str, LoadRun]]) -> Measured:
    """Every policy at one rate: repeat by repeat, each repeat in another order, all policies on the repeat's arrivals."""
    real: dict[str, list[dict[str, Any]]] = {p.label: [] for p in bench.choices}
    options = bench.options
    asked = Asked(workload=bench.workload, cut=bench.cut, fields="class", patience=options.patience)
    for repeat in range(options.repeats):
        shift = repeat % len(bench.choices)
        for policy in (*bench.choices[shift:], *bench.choices[:shift]):
            target = bench.targets[policy.label]
            seed = options.seed + repeat
            run, about = await offered(target, asked, rate, seed)
            found = {**about, **run_result(run, target.ladder)}
            real[policy.label].append(found)
            runs.append((f"{policy.label} rate {rate:g} seed {seed}", run))
            bench.tell(_line(policy.label, repeat, found))
    return Measured(rate, real)


def _row(bench: Bench, measured: Measured, costs: dict[str, CostModel]) -> dict[str, Any]:
    """A rate as JSON, with the same arrivals in the simulator. costs: what each server had learned of its steps when it ended."""
    options = bench.options
    made = {}
    for policy in bench.choices:
        replays = [
            _replayed(bench, policy, costs[policy.label], measured.rate, options.seed + repeat)
            for repeat in range(options.repeats)
        ]
        made[policy.label] = {"real": measured.real[policy.label], "simulated": replays}
    return {"rate": measured.rate, "policies": made, "ratios": ratios(made, [p.label for p in bench.choices])}


def _replayed(bench: Bench, policy: PolicyChoice, cost: CostModel, rate: float, seed: int) -> dict[str, Any]:
    target = bench.targets[policy.label]
    arrivals = bench.workload.arrivals(rate, seed, target.ladder, target.context)
    run = simulated(_simulated_server(bench, policy, cost, target), arrivals, bench.workload.seconds, bench.options.patience)
    return run_result(run, target.ladder)


def _simulated_server(bench: Bench, policy: PolicyChoice, cost: CostModel, target: Target) -> SimulatedServer:
    return SimulatedServer(policy=policy, cost=cost, ladder=target.ladder, engine=bench.engine, context=target.context)


def _line(label: str, repeat: int, real: dict[str, Any]) -> str:
    void = "; VOID: " + real["void"][0] if real["void"] else ""
    return f"{label} {repeat + 1}: goodput {real['goodput']:.2f} requests/s{void}"


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
