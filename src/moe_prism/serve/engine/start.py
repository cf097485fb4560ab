"""The engine's side of a server: model, levels, cost model, policy. Runs in the process that computes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...adapters.file import read_adapter
from ...artefact.load import load
from ...artefact.open import open_to_write
from ...cores import cores
from ...elastic import Elastic
from ...elastic.adapters import Adapters
from ...elastic.bind import bind
from ...elastic.paged_past import keeps_every_token
from ...elastic.runtime import slots_per_token
from ...errors import PrismError, UsageError
from ...jobs.adapter import add_adapters
from ...jobs.patterns import TaskAsked, wear_pattern
from ...methods.decode.run import function_of
from ...methods.decode.self_draft import SelfDraft, SelfDraftParameters
from ...options.serve import ServeOptions
from ...point import OperatingPoint
from ...schedule import CostModel, policies
from ...schedule.base import Ladder
from ..backend import Ran
from ..config import Config
from ..process.messages import Facts
from .decoding import DecodingOffer
from .engine import Engine
from .ladder import Refusal, find_ladder, measure_ladder
from .probe import Script, probe
from .routing_log import RoutingLog
from .scheduler import PackedStep
from .size import EngineSize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunningEngine:
    """A running engine, and what was measured for it."""

    engine: Engine
    tokenizer: Any
    cost: CostModel
    facts: Facts
    save_cost: Path | None
    routing: RoutingLog | None = None

    def watch(self, heard: Callable[[Ran, float], None]) -> None:
        """From now on the cost model learns from every step, and `heard` is told of it, in the engine's thread."""

        def observe(step: Ran, seconds: float) -> None:
            if step.totals is not None:
                self.cost.observe(step.totals, seconds)
            if self.routing is not None:
                self.routing.note(step if isinstance(step, PackedStep) else None)
            heard(step, seconds)

        self.engine.observer = observe

    def stop(self) -> None:
        """End the engine, and keep what the cost model has learned."""
        self.engine.stop()
        if self.routing is not None:
            self.routing.close()
        if self.save_cost:
            self.cost.save(self.save_cost)


def start_engine(
    folder: Path, options: ServeOptions, config: Config, known: dict[str, Any] | None = None, loaded: Sequence[str] = ()
) -> RunningEngine:
    """Load, measure and start. Raises PrismError with a cause; nothing is left running then.

    known: the cost model of an engine before; loaded: NAME=FOLDER of adapters that were loaded into that one.
    """
    drafting = _drafting(options.self_draft)
    verifier = None if options.verifier is None else function_of(options.verifier)
    cost = CostModel.from_json(known) if known else CostModel.load(options.cost) if options.cost else None
    torch.set_num_threads(compute_threads(config.engine.threads))
    _say("loading the model")
    model, tokenizer = _opened(folder, options, config.engine.cache_tokens)
    model.eval()
    elastic: Elastic = model._moe_prism
    if options.patterns is not None:
        named = wear_pattern(model, tokenizer, options.patterns, TaskAsked(options.task, options.task_prompts, options.task_keep))
        _say("only the experts of a task take part", task=named.name)
    adapters = load_adapters(model, folder, options, loaded)
    ladder, ladder_from = find_ladder(folder, slots_per_token(elastic), _refusal(elastic), options.points)
    if ladder is None:
        _say("measuring operating points: the folder has no measured frontier")
        ladder, ladder_from = measure_ladder(model, tokenizer, folder), "measured"
    _say("compiling kernels", levels=len(ladder))
    _compile_kernels(model, ladder)
    size = config.engine
    engine = Engine(
        model,
        ladder,
        Script(ladder),
        EngineSize(size.requests, size.step_tokens, size.cache_tokens, size.page, size.prefix_cache, size.decoding),
        tokenizer=tokenizer,
        adapters=adapters,
        drafting=drafting,
        decoding=DecodingOffer(options.decoding, verifier),
    )
    engine.start()
    try:
        cost_from = str(options.cost) if options.cost else "measured"
        if cost is None:
            _say("measuring what steps cost", seconds=options.probe_seconds)
        cost = cost or probe(engine, _text(tokenizer), options.probe_seconds)
        if options.save_cost:
            cost.save(options.save_cost)
        engine.replace_policy(policies.get(options.policy or config.policy)(ladder, cost, **config.policy_options))
        rate = size.step_tokens / max(1e-5, cost.prefill(size.step_tokens, ladder.levels[-1].slots))  # a short probe may find 0
        levels = [level.to_json() for level in ladder.levels]
        fixed = (levels, engine.context, engine.eos, engine.vocabulary, engine.policy_name)
        facts = Facts(*fixed, rate, ladder_from, cost_from, cost.to_json())
        facts = facts._replace(adapters=tuple(engine.adapters.values()))
        _forget_probe(elastic)
        return RunningEngine(engine, tokenizer, cost, facts, options.save_cost, _routing_log(model, ladder, options))
    except BaseException:
        engine.stop()
        raise


def _forget_probe(elastic: Elastic) -> None:
    """What experts on disk did for the measurement is not what they do for requests."""
    store = getattr(elastic, "store", None)
    if store is not None:
        store.forget_figures()


def _routing_log(model: Any, ladder: Ladder, options: ServeOptions) -> RoutingLog | None:
    """Where --trace-out is given; not a second time where an engine before has written it."""
    out = options.trace_out
    if out is None or out.exists():
        return None
    return RoutingLog(model, [level.point for level in ladder.levels], out, options.trace_tokens, ids=options.trace_ids)


def _drafting(asked: str | None) -> SelfDraftParameters | None:
    """How requests draft. UsageError for what says nothing."""
    if asked is None:
        return None
    return SelfDraft("self-draft", SelfDraft.read_argument("self-draft", asked)).parameters


def _opened(folder: Path, options: ServeOptions, cache_tokens: int) -> tuple[Any, Any]:
    """(model, tokenizer): elastic, or whole experts of any other checkpoint. UsageError for an option that only an elastic one has."""
    if options.store is not None or options.verify:
        store = None if options.store is None else replace(options.store, cache_tokens=cache_tokens)
        return load(folder, store=store, verify=options.verify)
    return open_to_write(folder)


def load_adapters(model: Any, folder: Path, options: ServeOptions, loaded: Sequence[str] = ()) -> Adapters | None:
    """The adapters that the server was started with, and room for those that may come; None for neither.

    loaded: those that came to an engine before. One that cannot be loaded any more is left out, with a warning: its folder is an
    administrator's, and no reason to serve nothing.
    """
    if not options.adapters and options.adapter_folder is None:
        return None
    read = {name: read_adapter(where) for name, where in options.named_adapters().items()}
    elastic: Elastic = model._moe_prism
    room = 0 if options.adapter_folder is None else options.adapter_room or elastic.layers[0].parts.layer.num_experts
    made = add_adapters(model, folder, read, room)
    for entry in loaded:
        name, _, where = entry.partition("=")
        try:
            made.load(name, read_adapter(where))
        except PrismError as error:
            logger.warning("an adapter is left out", extra={"fields": {"adapter": name, "cause": error.cause}})
    _say("adapters", loaded=len(made.loaded), bytes=made.bytes, reserved=made.reserved)
    return made


def _say(stage: str, **facts: Any) -> None:
    """Progress, for who waits for the server."""
    logger.info(stage, extra={"fields": facts})


@torch.no_grad()
def _compile_kernels(model: Any, ladder: Ladder) -> None:
    """One small forward at every level: kernels are compiled at first use, which is not to be a client's first request."""
    elastic: Elastic = model._moe_prism
    for level in ladder.levels:
        with elastic.at([level.point]):
            model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=model.device))


def _refusal(elastic: Elastic) -> Refusal:
    def refusal(point: OperatingPoint) -> str | None:
        try:
            bound = bind(elastic, [point])
        except UsageError as error:
            return error.cause
        if bound.follows and not keeps_every_token(elastic.model):
            what = "its budget is held" if bound.holds else "it looks at earlier tokens"
            return f"{what}, and every layer's cache is a window: measure it with control 'none', or without such a stage"
        return None

    return refusal


def compute_threads(wanted: int | None) -> int:
    """Threads of a forward pass.

    Threads wait for each other many times in a layer. One that shares its core with the HTTP side makes all of them wait for a turn of the
    operating system: on two cores, two threads served prism-nano slower than one.
    """
    if wanted is not None:
        return wanted
    return max(1, min(torch.get_num_threads(), cores() - 1))


def _text(tokenizer: Any) -> list[int]:
    """Tokens of some real text, to probe with: routing of random tokens is not that of text."""
    import argparse

    return list(tokenizer(inspect.getsource(argparse)[:60_000])["input_ids"])
