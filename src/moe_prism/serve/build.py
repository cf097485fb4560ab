"""Put a server together: model, levels, cost model, policy, engine."""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..api import load
from ..elastic.runtime import operating_point, slots_per_token
from ..errors import UsageError
from ..schedule import CostModel, policies
from .config import Config
from .door import Door
from .engine import Engine, EngineSize
from .ladder import find_ladder, measure_ladder
from .metrics import Metrics
from .probe import Script, probe
from .server import ServeOptions
from .service import Service
from .status import History

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A running engine and what speaks to it."""

    service: Service
    door: Door
    cost: CostModel
    history: History
    ladder_from: str
    cost_from: str


def build(folder: Path, options: ServeOptions, config: Config) -> Built:
    """Load and start. Raises PrismError with a cause; nothing is left running then."""
    chosen = options.policy or config.policy
    make = policies.get(chosen)  # an unknown name is found before anything is loaded
    _check_options(make, config.policy_options, chosen)
    cost = CostModel.load(options.cost) if options.cost else None
    torch.set_num_threads(compute_threads(config.engine.threads))
    model, tokenizer = load(folder, store=options.store)
    model.eval()
    ladder, ladder_from = find_ladder(folder, slots_per_token(model._moe_prism))
    if ladder is None:
        logger.info("measuring operating points: the folder has no frontier of the threshold rule")
        ladder, ladder_from = measure_ladder(model, tokenizer, folder), "measured"
    _compile_kernels(model)
    size = config.engine
    engine = Engine(
        model,
        ladder,
        Script(ladder),
        EngineSize(size.requests, size.step_tokens, size.cache_tokens, size.page, size.prefix_cache),
    )
    engine.start()
    try:
        cost_from = str(options.cost) if cost else "measured"
        cost = cost or probe(engine, _text(tokenizer), options.probe_seconds)
        if options.save_cost:
            cost.save(options.save_cost)
        engine.replace_policy(make(ladder, cost, **config.policy_options))
        name = options.name or folder.resolve().name
        metrics = Metrics(name, config.classes, ladder)
        history = History(ladder)
        engine.observer = _observer(metrics, cost, history)
        rate = size.step_tokens / cost.prefill(size.step_tokens, ladder.levels[-1].slots)
        service = Service(engine, tokenizer, config, metrics, name)
        return Built(service, Door(config, rate, metrics.refuse), cost, history, ladder_from, cost_from)
    except BaseException:
        engine.stop()
        raise


@torch.no_grad()
def _compile_kernels(model: Any) -> None:
    """One small forward below full budget: kernels are compiled at first use, which is not to be a client's first request."""
    with operating_point(model, 0.5):
        model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=model.device))


def compute_threads(wanted: int | None) -> int:
    """Threads of a forward pass.

    Threads wait for each other many times in a layer. One that shares its core with the HTTP loop makes all of them wait for a turn of the
    operating system: on two cores, two threads served prism-nano slower than one.
    """
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores - 1))


def _observer(metrics: Metrics, cost: CostModel, history: History) -> Any:
    def observe(step: Any, seconds: float) -> None:
        metrics.observe_step(step, seconds)
        cost.observe(step.totals, seconds)
        history.observe(step, seconds)

    return observe


def _check_options(make: Any, given: dict[str, Any], name: str) -> None:
    known = [p for p in inspect.signature(make).parameters if p not in ("self", "ladder", "cost")]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UsageError(f"policy '{name}' has no option '{unknown[0]}'", f"choose from: {', '.join(known) or 'none'}")


def _text(tokenizer: Any) -> list[int]:
    """Tokens of some real text, to probe with: routing of random tokens is not that of text."""
    import argparse

    return list(tokenizer(inspect.getsource(argparse)[:60_000])["input_ids"])
