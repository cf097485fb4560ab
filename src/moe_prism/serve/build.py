"""Put a server together: an engine, here or in a process of its own, and what speaks to it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..options.serve import ServeOptions
from ..schedule import CostModel, policies
from .backend import Backend, Tally
from .config import Config
from .http.admission import Door
from .http.metrics import Metrics
from .http.service import Service
from .http.status import History
from .process.messages import Facts


@dataclass(frozen=True)
class Built:
    """A running engine and what speaks to it. `stop` ends the engine."""

    service: Service
    door: Door
    history: History
    facts: Facts
    stop: Callable[[], None]


def build(folder: Path, options: ServeOptions, config: Config) -> Built:
    """Load and start. Raises PrismError with a cause; nothing is left running then."""
    chosen = options.policy or config.policy
    _check_options(policies.get(chosen), config.policy_options, chosen)  # found before anything is loaded
    if options.cost:
        CostModel.load(options.cost)
    return (_in_a_process if config.engine.process else _in_a_thread)(folder, options, config)


def _in_a_thread(folder: Path, options: ServeOptions, config: Config) -> Built:
    from .engine.start import start_engine

    running = start_engine(folder, options, config)
    try:
        service, door, history, heard = _http(running.engine, running.tokenizer, running.facts, folder, options, config)
        running.watch(lambda step, seconds: heard(step.tally(seconds)))
        return Built(service, door, history, running.facts, running.stop)
    except BaseException:
        running.stop()
        raise


def _in_a_process(folder: Path, options: ServeOptions, config: Config) -> Built:
    if os.name != "posix":
        raise UsageError("engine.process needs a POSIX system", "set it to false")
    from .process.remote_engine import RemoteEngine
    from .process.spawn import EngineProcess

    process = EngineProcess(folder, options, config)
    try:
        from ..model import load_tokenizer  # while the process loads the model

        tokenizer = load_tokenizer(folder)
        facts = process.ready()
        engine = RemoteEngine(process, facts)
        service, door, history, engine.observer = _http(engine, tokenizer, facts, folder, options, config)
        return Built(service, door, history, facts, engine.stop)
    except BaseException:
        process.kill()
        raise


def _http(
    engine: Backend, tokenizer: Any, facts: Facts, folder: Path, options: ServeOptions, config: Config
) -> tuple[Service, Door, History, Callable[[Tally], None]]:
    """Everything on this side of an engine, and who must hear of its steps."""
    name = options.name or folder.resolve().name
    metrics = Metrics(name, config.classes, facts.ladder)
    history = History(facts.ladder)

    def heard(tally: Tally) -> None:
        metrics.observe_step(tally)
        history.observe(tally)

    return Service(engine, tokenizer, config, metrics, name), Door(config, facts.rate, metrics.refuse), history, heard


def _check_options(make: Any, given: dict[str, Any], name: str) -> None:
    known = [p for p in inspect.signature(make).parameters if p not in ("self", "ladder", "cost")]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UsageError(f"policy '{name}' has no option '{unknown[0]}'", f"choose from: {', '.join(known) or 'none'}")
