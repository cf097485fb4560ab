"""Put a server together: model, levels, cost model, policy, engine."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import load
from ..elastic.runtime import slots_per_token
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
    model, tokenizer = load(folder, store=options.store)
    model.eval()
    ladder, ladder_from = find_ladder(folder, slots_per_token(model._moe_prism))
    if ladder is None:
        logger.info("measuring operating points: the folder has no frontier of the threshold rule")
        ladder, ladder_from = measure_ladder(model, tokenizer, folder), "measured"
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
