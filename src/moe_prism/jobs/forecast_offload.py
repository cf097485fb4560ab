"""Say how a model that does not fit should be run: which budget, policy and precision, and what a token will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..artefact.load import load
from ..checkpoint import read_manifest
from ..data import token_windows
from ..elastic import operating_point
from ..elastic.dial import affordable
from ..elastic.runtime import slots_per_token
from ..errors import UsageError
from ..offload.cache import cache_policies
from ..offload.predict import Predictor
from ..offload.predict.gate import CrossLayerGate
from ..offload.record import TraceRecorder, record
from ..offload.replay import Prefetch, groups
from ..offload.trace import Trace
from ..options.offload import OffloadOptions
from ..options.text import source_in
from ..point import FULL
from ..point.named import find_point
from ..progress import Report, silent
from ..result import Result
from ..store import StoreOptions, parse_bytes
from ..store.decisions import Decisions, measure_guess, measure_uncompiled
from ..store.fit import key_values, read_ahead
from ..store.fitted import Chosen, choose
from ..store.plane_store import PlaneStore
from ..store.pools import Eviction
from ..store.price_reads import ReadPrices, at_budget, measure_prices, measure_step, replayed
from ..store.record_store import RecordStore
from .forecast_planes import forecast_planes

BUDGETS = (0.75, 0.5, 0.25)  # compared with full budget unless others are named
LENGTH, PROMPT = 160, 32


@dataclass(frozen=True)
class Way:
    """One way to run. precision: of what is read on a miss; slots: kept per token and layer on average; ms_per_token: expected;
    ahead: records read ahead of a layer at most; point: the name of one that was asked for, of records of planes.
    """

    budget: float
    slots: float
    policy: str
    precision: str
    hit_rate: float
    reads_per_token: float
    ms_per_token: float
    ahead: int = 0
    point: str = ""


@dataclass(frozen=True)
class OffloadForecast(Result):
    """`best`: the largest budget that meets the target (the fastest way where none does, `met` is then false).

    For `offload fit`: layer_ms: what a layer computes in a step of `best`; record_ms: what one record more takes of many that are read at
    once; first_ms: what their reads take besides; busy_ms: the computing thread's own work for a record; uncompiled_ms, guess_ms: what a
    layer takes more where a policy has no compiled table, and where something is read ahead.
    """

    memory: int
    slots: int
    records: int
    record_bytes: int
    bytes_per_second: float
    layer_ms: float
    record_ms: float
    busy_ms: float
    uncompiled_ms: float
    guess_ms: float
    first_ms: float
    best: Way
    met: bool
    ways: list[Way]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_records(self) -> list[dict[str, Any]]:
        """A row per way to run."""
        return [asdict(way) for way in self.ways]


def forecast_offload(
    folder: str | Path, memory: int, options: OffloadOptions | None = None, *, report: Report = silent
) -> OffloadForecast:
    """Measure the link and the steps, replay the routing of calibration text, and compare ways to run in `memory` bytes.

    Raises UsageError for a target, link or budget that is impossible, DoesNotFit if the memory holds no sub-expert.

    >>> import moe_prism
    >>> asked = moe_prism.OffloadOptions(budgets=[0.5])
    >>> found = moe_prism.forecast_offload("elastic", 5_000_000, asked)
    >>> found.best in found.ways
    True
    """
    options = options or OffloadOptions()
    options.check()
    link = None if options.link is None else parse_bytes(options.link, "bytes per second")
    if not all(0 < b <= 1 for b in options.budgets or ()):
        raise UsageError("budgets lie in (0, 1]", "1 keeps every slot")
    chosen = choose(None, {}, options.expert_ahead, options.expert_predictor, options.expert_settings)
    model, tokenizer = load(folder, store=StoreOptions(memory, options.expert_file, parts=options.expert_parts))
    elastic, store = model._moe_prism, model._moe_prism.store
    if isinstance(store, PlaneStore):
        return _of_planes(folder, memory, model, tokenizer, chosen, options)
    if options.point:
        raise UsageError("--point belongs to records of planes", "give budgets, or an --expert-file of planes")
    budgets = options.budgets or (1.0, *affordable(elastic, BUDGETS))
    windows = _windows(folder, tokenizer, options)
    with report("trace") as update, operating_point(model):
        recorder = TraceRecorder(model, values=True, inputs=bool(chosen.width))
        trace = record(recorder, [("calibration", windows)], prompt=PROMPT, progress=update)
    here = measure_prices(store)
    forms = {"exact": (here, store.pack.layout.bytes)}
    if store.pack.has_low:
        forms["int8"] = measure_prices(store, low=True), store.pack.layout.low_bytes
    prices = {name: price.over(size / link) if link else price for name, (price, size) in forms.items()}
    ways, steps, decisions = [], {}, {}
    total, names = slots_per_token(elastic), runnable(chosen, store)
    with report("replay") as update:
        for number, budget in enumerate(budgets):
            steps[budget], decisions[budget] = measure_budget(model, windows[:1], budget, here)
            rows = at_budget(trace, elastic, budget).decode()
            kept = float(rows.slots().mean()) if budget < 1 else float(total)
            guess, predictor = prefetch_of(chosen, rows, store)
            asked = list(groups(rows, store.space))
            guessing = 0.0 if predictor is None else decisions[budget].predictor(predictor, rows)
            for name, eviction in names.items():
                deciding = decisions[budget].policy(eviction, asked)
                for ahead in (None,) if guess is None else (None, guess):
                    misses = replayed(asked, store.space, store.slots, eviction, ahead)
                    for precision, price in prices.items():
                        found = misses.at(price, steps[budget]).with_deciding(deciding + (0.0 if ahead is None else guessing))
                        own = found.hit_rate, found.reads, found.seconds * 1e3, 0 if ahead is None else ahead.width
                        ways.append(Way(budget, kept, name, precision, *own))
            update(number + 1, len(budgets))
    best, met = choose_way(ways, options.target_ms)
    rate = prices["exact"].bandwidth if len(store.space) > store.slots else 0.0
    store.close()
    step, measured = steps[best.budget], decisions[best.budget]
    costs = FitPrices.of(prices["exact"], step, measured) if rate else FitPrices(1e3 * step / store.space.layers)
    size = store.pack.layout.bytes
    return OffloadForecast(memory, store.slots, len(store.space), size, rate * size, *costs, best, met, ways)


def _windows(folder: str | Path, tokenizer: Any, options: OffloadOptions) -> Tensor:
    """[B, LENGTH] tokens of calibration text."""
    text = source_in(read_manifest(folder)["calibration"])
    return token_windows(tokenizer, text, "calibration", length=LENGTH, tokens=max(options.tokens, LENGTH)).ids


def _of_planes(
    folder: str | Path, memory: int, model: Any, tokenizer: Any, chosen: Chosen, options: OffloadOptions
) -> OffloadForecast:
    """Of records of planes: all bits, and the points that are named. Nothing read ahead is forecast."""
    if options.budgets is not None:
        raise UsageError("planes are forecast at points, not at budgets", "name points with --point")
    if chosen.width:
        raise UsageError("reading planes ahead is not forecast", "leave --expert-ahead out, and run it")
    store, link = model._moe_prism.store, options.link
    points = {"": FULL, **{name: find_point(name, folder).point for name in options.point}}
    slower = 0.0 if link is None else store.pack.layout.bytes / parse_bytes(link, "bytes per second")
    policies = runnable(chosen, store)
    prices, found = forecast_planes(model, _windows(folder, tokenizer, options), PROMPT, policies, points, slower)
    ways = []
    for own in found:
        slots = points[own.name].slots
        told = own.found.hit_rate, own.found.reads, 1e3 * own.found.seconds
        ways.append(Way(slots.budget, own.slots, own.policy, "planes", *told, point=own.name))
    best, met = choose_way(ways, options.target_ms)
    step = next(own.step for own in found if (own.name, own.policy) == (best.point, best.policy))
    rate = prices.bandwidth if len(store.space) > store.slots else 0.0
    measured = Decisions(store.space, store.slots)
    costs = FitPrices.of(prices, step, measured) if rate else FitPrices(1e3 * step / store.space.layers)
    store.close()
    size = store.pack.layout.bytes
    return OffloadForecast(memory, store.slots, len(store.space), size, rate * size, *costs, best, met, ways)


class FitPrices(NamedTuple):
    """What `offload fit` is told, in milliseconds."""

    layer: float
    record: float = 0.0
    busy: float = 0.0
    uncompiled: float = 0.0
    guess: float = 0.0
    first: float = 0.0

    @classmethod
    def of(cls, prices: ReadPrices, step: float, own: Decisions) -> FitPrices:
        """step: seconds."""
        most = prices.counts[-1]
        record = (prices.of(most) - prices.of(1)) / (most - 1) if most > 1 else prices.of(1)
        record = max(record, prices.of(most) / most / 2)  # beside other work a curve may be flat, and no record is free
        first = max(0.0, prices.of(1) - record)
        found = step / own.space.layers, record, prices.work(most) / most, own.uncompiled, own.guess, first
        return cls(*(1e3 * seconds for seconds in found))


def measure_budget(model: Any, text: Tensor, budget: float, here: ReadPrices) -> tuple[float, Decisions]:
    """(seconds of a step apart from its reads, what deciding costs). text [1, n]: decoded, after a prompt."""
    store = model._moe_prism.store
    with operating_point(model, budget):
        step = measure_step(model, text, PROMPT, here)
        uncompiled = measure_uncompiled(model, text, PROMPT, here, step)
        return step, Decisions(store.space, store.slots, uncompiled, measure_guess(model._moe_prism))


def runnable(chosen: Chosen, store: RecordStore) -> dict[str, Eviction]:
    """Every policy that a store can run: that need not know the future, and has its fit where it needs one."""
    fitted = None if chosen.fitted is None else chosen.fitted.policy
    kinds = {name: cache_policies.get(name) for name in cache_policies.names()}
    able = {name: kind for name, kind in kinds.items() if not kind.needs_future and (name == fitted or not kind.needs_fit)}
    space, group = store.space, store.group
    return {
        name: chosen.eviction(space, len(space), group) if name == fitted else Eviction(kind, {}, group)
        for name, kind in able.items()
    }


def prefetch_of(chosen: Chosen, rows: Trace, store: RecordStore) -> tuple[Prefetch, Predictor] | tuple[None, None]:
    """What is read ahead on a trace, and what guesses it; None for nothing."""
    if not chosen.width:
        return None, None
    space = store.space
    guess = chosen.guess(space, store.pack.layout.hidden).predictor or CrossLayerGate.fit(rows, space)
    return replace(read_ahead(guess, rows, key_values(rows, space)), width=chosen.width), guess


def choose_way(ways: Sequence[Way], target_ms: float | None) -> tuple[Way, bool]:
    """The largest budget within the target, exact before int8, then the fastest; without one that meets it, the fastest of all."""
    fits = [w for w in ways if target_ms is None or w.ms_per_token <= target_ms]
    if not fits:
        return min(ways, key=lambda w: w.ms_per_token), False
    return max(fits, key=lambda w: (w.budget, w.precision == "exact", -w.ms_per_token)), True
