"""Put a server together: an engine, here or in a process of its own, and what speaks to it."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.companions import origin
from ..errors import UsageError
from ..options.serve import ServeOptions
from ..point import name_within
from ..schedule import CostModel, policies
from .backend import Backend, Tally
from .config import Config
from .http.admission import Door
from .http.metrics import Metrics
from .http.routes import House
from .http.service import Service
from .http.status import History
from .process.messages import Facts
from .text.desk import Desk
from .text.workers import Workers


@dataclass(frozen=True)
class Built:
    """A running engine and what speaks to it. `stop` ends the engine."""

    house: House
    history: History
    facts: Facts
    stop: Callable[[], None]

    @property
    def service(self) -> Service:
        return self.house.service

    @property
    def door(self) -> Door:
        return self.house.door

    def ended(self) -> str | None:
        """Why nothing can be served any more, though nobody asked it to end."""
        return self.service.engine.ended() or self.house.workers.ended()


def build(folder: Path, options: ServeOptions, config: Config) -> Built:
    """Load and start. Raises PrismError with a cause; nothing is left running then."""
    chosen = options.policy or config.policy
    usual: str | None = None
    _check_options(policies.get(chosen), config.policy_options, chosen)  # found before anything is loaded
    if options.cost:
        CostModel.load(options.cost)
    if options.bytes_per_token is not None:
        usual = name_within(options.bytes_per_token, folder, per_token=True)
        options = replace(options, points=(usual,))
    return (_in_a_process if config.engine.process else _in_a_thread)(ToServe(folder, options, config, usual))


def _workers(folder: Path, config: Config) -> Workers:
    """Before this process has threads, since it forks."""
    from ..model import load_tokenizer

    bounds = config.bounds
    return Workers(Desk(load_tokenizer(folder), bounds.template_bytes, bounds.grammar_bytes), bounds)


def _in_a_thread(asked: ToServe) -> Built:
    from .engine.start import start_engine

    folder, options, config, _ = asked
    with ExitStack() as undo:
        workers = _workers(folder, config)
        undo.callback(workers.close)
        running = start_engine(folder, options, config)
        undo.callback(running.stop)
        house, history, heard = _http(running.engine, workers, running.facts, asked)
        running.watch(lambda step, seconds: heard(step.tally(seconds)))
        return Built(house, history, running.facts, undo.pop_all().close)


def _in_a_process(asked: ToServe) -> Built:
    folder, options, config, _ = asked
    if os.name != "posix":
        raise UsageError("engine.process needs a POSIX system", "set it to false")
    from .process.messages import Start
    from .process.spawn import EngineProcess
    from .process.supervisor import Supervisor

    began = time.monotonic()
    start = Start.of(folder, options, config)
    with ExitStack() as undo:
        process = EngineProcess(start)
        undo.callback(process.kill)
        workers = _workers(folder, config)  # while the process loads the model
        undo.callback(workers.close)
        facts = process.ready()
        engine = Supervisor(start, process, facts, time.monotonic() - began)
        house, history, engine.observer = _http(engine, workers, facts, asked)
        undo.pop_all()
        end = ExitStack()
        end.callback(workers.close)
        end.callback(engine.stop)
        return Built(house, history, facts, end.close)


class ToServe(NamedTuple):
    """What the operator asked for. usual: the point of requests that say no quality; None: their class decides."""

    folder: Path
    options: ServeOptions
    config: Config
    usual: str | None


def _http(engine: Backend, workers: Workers, facts: Facts, asked: ToServe) -> tuple[House, History, Callable[[Tally], None]]:
    """Everything on this side of an engine, and who must hear of its steps."""
    config = asked.config
    name = asked.options.name or origin(asked.folder)
    metrics = Metrics(name, config.classes, facts.ladder)
    history = History(facts.ladder)

    def heard(tally: Tally) -> None:
        metrics.observe_step(tally)
        history.observe(tally)

    service = Service(engine, workers.desk.tokenizer, config, metrics, name, asked.usual)
    service.drafts, service.decoding = asked.options.self_draft is not None, asked.options.decoding
    service.verifies = asked.options.verifier is not None
    return House(service, Door(config, facts.rate, metrics.refuse), workers), history, heard


def _check_options(make: Any, given: dict[str, Any], name: str) -> None:
    known = [p for p in inspect.signature(make).parameters if p not in ("self", "ladder", "cost")]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UsageError(f"policy '{name}' has no option '{unknown[0]}'", f"choose from: {', '.join(known) or 'none'}")
