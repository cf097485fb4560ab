"""Predict how fast a model decodes with fewer experts per token, fewer experts, or fewer sub-experts, at every concurrency."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artefact.load import load
from ..checkpoint import read_manifest, versions
from ..checkpoint.companions import origin
from ..data import token_windows
from ..elastic.dial import affordable
from ..errors import UsageError
from ..forecast.distinct import Routing
from ..forecast.speed import ELASTIC, PAYS, STOCK, ForecastPoint, MeasuredStep, SpeedForecast, plain_points, predict
from ..forecast.step_time import Fit, Machine, Shape, StepLoad, Terms, fit, terms
from ..model import find_layers, load_to_run, load_tokenizer, resolve
from ..options.speed import WINDOW, SpeedOptions
from ..options.text import text_source
from ..progress import Report, silent
from .count_blocks import at_budget, block_choices
from .model_shape import config_tree, shape_of
from .time_steps import fewer_experts, measure_routing, needed_tokens, time_steps
from .which_text import default_source

PROBED = 4  # concurrencies that the probe times
CUTS = (0.75, 0.5, 0.25)  # budgets that the probe times, and those that are forecast unless others are named
ROUNDS = 4  # over all concurrencies; the fastest turn of all rounds counts, which is the one that a busy machine disturbed least

Key = tuple[str, int, str]
"""Engine, concurrency, point."""


def forecast_speed(model: str | Path, options: SpeedOptions | None = None, *, report: Report = silent) -> SpeedForecast:
    """Predicted tokens/s of a model at every concurrency: full, skipping experts, pruned, and, if it is elastic, at sub-expert budgets.

    With a machine that the options describe, only config.json is read (and the weights, where a text to count routing on is given).
    Without, the model is loaded, its routing counted and its decoding steps timed. Raises UsageError for a model without experts
    and for bad options.

    >>> import moe_prism
    >>> machine = moe_prism.SpeedOptions(concurrency=(1, 32), bandwidth=3.35e12, peak=989e12, fixed=4e-3)
    >>> found = moe_prism.forecast_speed("nano", machine)
    >>> found.names[:2], len(found.to_records()) == 2 * len(found.names)
    (['top-4', 'top-3'], True)
    """
    options = options or SpeedOptions()
    options.check()
    machine = _machine(options)
    if machine is not None and options.text is None:
        return _from_config(model, options, machine)
    return _SpeedForecaster(model, options, machine, report).forecast()


def _machine(options: SpeedOptions) -> Machine | None:
    """The machine that the options describe; None: measure this one."""
    if options.bandwidth is None or options.peak is None:
        return None
    return Machine(options.bandwidth, options.peak, options.fixed or 0.0)


def _from_config(model: str | Path, options: SpeedOptions, machine: Machine) -> SpeedForecast:
    shape = _shape(config_tree(model), options)
    routing = Routing.even([(layer.experts, layer.chosen) for layer in shape.layers])
    rows = predict(shape, plain_points(shape, routing, options.keep), {STOCK: machine}, _loads(options))
    return SpeedForecast(_name(model), rows, {STOCK: machine}, shape, _facts(options, routing, "even (assumed)"))


def _name(model: str | Path) -> str:
    path = Path(model)
    return origin(path.parent if path.name == "config.json" else path) if path.exists() else str(model)


def _shape(tree: Any, options: SpeedOptions) -> Shape:
    if getattr(tree.config, "quantization_config", None) and options.bits is None:
        raise UsageError("the weights are quantized and their width is not in the config", "give --bits, 8 for FP8")
    return shape_of(tree, bytes_per_weight=None if options.bits is None else options.bits / 8)


def _loads(options: SpeedOptions) -> list[StepLoad]:
    return [StepLoad(batch, options.context, options.prompt) for batch in options.concurrency]


def _facts(options: SpeedOptions, routing: Routing, source: str) -> dict[str, Any]:
    return {
        "routing": {"source": source, "tokens": routing.tokens},
        "load": {"context": options.context, "prompt_per_token": options.prompt},
        "pays_from": PAYS,
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


class _SpeedForecaster:
    """The model itself: loaded, its routing counted, its steps timed."""

    def __init__(self, source: str | Path, options: SpeedOptions, machine: Machine | None, report: Report) -> None:
        self.source, self.options, self.given, self.report = source, options, machine, report
        self.text = default_source(source) if options.text is None else text_source(options.text, options.text_field)
        self.tokenizer = load_tokenizer(source)

    def forecast(self) -> SpeedForecast:
        options, fits, measured = self.options, dict[str, Fit | Machine](), dict[Key, MeasuredStep]()
        ids = token_windows(self.tokenizer, self.text, "calibration", length=WINDOW, tokens=options.tokens).ids
        shape, routing, points = self._stock(ids, fits, measured)
        if self.given is None and options.budgets != () and self._is_elastic():
            points = [*points, *self._elastic(shape, points[0], ids, fits, measured)]
        machines = {name: found.machine if isinstance(found, Fit) else found for name, found in fits.items()}
        rows = predict(shape, points, machines, _loads(options), measured)
        return SpeedForecast(_name(self.source), rows, fits, shape, _facts(options, routing, self.text.label))

    def _stock(
        self, ids: Tensor, fits: dict[str, Fit | Machine], measured: dict[Key, MeasuredStep]
    ) -> tuple[Shape, Routing, list[ForecastPoint]]:
        """The model as it is: shape, routing, points; its machine is added to fits."""
        model = load_to_run(self.source)
        layers = find_layers(model, dense=False)
        if model.device.type == "cpu":
            for layer in layers:
                layer.arrange()
        shape = _shape(model, self.options)
        with self.report("routing") as update:
            routing = measure_routing(model, layers, ids, progress=update)
        points = [
            replace(point, run=partial(fewer_experts, layers, round(point.choice[0].shares[0].sum())))
            if point.kind in ("full", "skip")
            else point
            for point in plain_points(shape, routing, self.options.keep)
        ]
        if self.given is not None:
            fits[STOCK] = self.given
        else:
            fits[STOCK], found = self._calibrate("probe", model, shape, points, points)
            measured |= found
        return shape, routing, [replace(point, run=None) for point in points]  # which lets go of the model

    def _is_elastic(self) -> bool:
        where = resolve(self.source)
        return (where / "prism.json").is_file() and read_manifest(where).get("kind") == "elastic"

    def _elastic(
        self, shape: Shape, full: ForecastPoint, ids: Tensor, fits: dict[str, Fit | Machine], measured: dict[Key, MeasuredStep]
    ) -> list[ForecastPoint]:
        """Points at sub-expert budgets; the machine they run on is added to fits."""
        model, _ = load(self.source)
        cuts_at = affordable(model._moe_prism, CUTS)
        asked_for = cuts_at if self.options.budgets is None else self.options.budgets
        counted = sorted({*asked_for, *cuts_at})
        points = {
            budget: ForecastPoint(f"{budget:.0%} of bytes", "sub-experts", choice, ELASTIC, at_budget(model, budget))
            for budget, choice in block_choices(model, ids, counted).items()
        }
        asked, cuts = ([points[budget] for budget in budgets] for budgets in (asked_for, cuts_at))
        whole = replace(full, engine=ELASTIC, run=nullcontext)
        fits[ELASTIC], found = self._calibrate("probe of sub-experts", model, shape, cuts, [whole, *asked])
        measured |= found
        return [replace(point, run=None) for point in asked]

    def _calibrate(
        self, title: str, model: Any, shape: Shape, points: Sequence[ForecastPoint], measured: Sequence[ForecastPoint]
    ) -> tuple[Fit, dict[Key, MeasuredStep]]:
        """A machine fitted to the dearest, a middle and the cheapest runnable point at four concurrencies.

        With `measure`, the points to measure are timed at all concurrencies in the same rounds, and returned, but not fitted to.
        """
        options = self.options
        runnable = [p for p in points if p.run]
        few = {p.name: p for p in (runnable[i] for i in sorted({0, len(runnable) // 2, len(runnable) - 1}))}
        every = {**few, **({p.name: p for p in measured if p.run} if options.measure else {})}
        batches = probed(options.concurrency)
        timed = self._time(
            title, model, list(every.values()), sorted({*batches, *(options.concurrency if options.measure else ())})
        )
        used = [
            (_need(shape, few[name], n, was), was.seconds) for (_, n, name), was in timed.items() if name in few and n in batches
        ]
        return fit(used), timed if options.measure else {}

    def _time(self, title: str, model: Any, points: Sequence[ForecastPoint], batches: Sequence[int]) -> dict[Key, MeasuredStep]:
        runnable = [(p, p.run) for p in points if p.run]
        prompt = self._prompt(model, len(runnable))
        ids = self._sequences(max(batches), prompt + needed_tokens(len(runnable)))
        rounds = [batch for _ in range(ROUNDS) for batch in batches]  # a load that comes and goes meets all of them
        seconds = self.options.seconds / len(rounds)
        found: dict[Key, MeasuredStep] = {}
        with self.report(title) as update:
            for done, batch in enumerate(rounds, 1):
                rows = ids[torch.arange(batch) * len(ids) // batch]
                timed = time_steps(model, rows, [run for _, run in runnable], prompt=prompt, seconds=seconds)
                for (point, _), each in zip(runnable, timed, strict=True):
                    key = (point.engine, batch, point.name)
                    found[key] = MeasuredStep(min(each.best, found[key].seconds if key in found else each.best), each.context)
                update(done, len(rounds))
        return found

    def _prompt(self, model: Any, points: int) -> int:
        """Prompt tokens such that the steps lie around the context asked for, as far as the model's limit allows."""
        grown = needed_tokens(points)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        if limit < grown + 8:
            raise UsageError(f"a context limit of {limit} is too short to time steps", "give --bandwidth and --peak")
        return int(max(8, min(self.options.context - grown / 2, limit - grown)))

    def _sequences(self, count: int, length: int) -> Tensor:
        """[>= count, length] of held-out text: a sequence of its own for every request of the largest batch."""
        ids = token_windows(self.tokenizer, self.text, "evaluation", length=length, tokens=length * count).ids
        if len(ids) < count:
            raise UsageError(
                f"text source '{self.text.label}' has {len(ids)} held-out sequences of {length} tokens, --concurrency asks for {count}",
                "give more text or a lower concurrency",
            )
        return ids


def _need(shape: Shape, point: ForecastPoint, batch: int, was: MeasuredStep) -> Terms:
    return terms(shape, point.choice, StepLoad(batch, was.context))


def probed(concurrency: Sequence[int]) -> list[int]:
    """The concurrencies that the probe times: 1, the highest and two between, small powers of two where fewer are asked for."""
    values = sorted({1, *concurrency})
    extra = (2**i for i in range(1, PROBED + 1) if 2**i not in values)
    while len(values) < PROBED:
        values = sorted([*values, next(extra)])
    return [values[round(i * (len(values) - 1) / (PROBED - 1))] for i in range(PROBED)]
