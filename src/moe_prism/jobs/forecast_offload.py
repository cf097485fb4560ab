"""Say how a model that does not fit should be run: which budget, policy and precision, and what a token will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..artefact.load import load
from ..checkpoint import read_manifest
from ..data import token_windows
from ..elastic import operating_point
from ..elastic.dial import affordable
from ..elastic.runtime import slots_per_token
from ..errors import UsageError
from ..offload.cache import cache_policies
from ..offload.record import TraceRecorder, record
from ..options.offload import OffloadOptions
from ..options.text import source_in
from ..progress import Report, silent
from ..result import Result
from ..store import ExpertStore, StoreOptions, parse_bytes
from ..store.choose_misses import Misses
from ..store.price_reads import at_budget, measure_prices, measure_step, replayed

POLICIES = ("lru", "lfu", "edge-moe")
BUDGETS = (0.75, 0.5, 0.25)  # compared with full budget unless others are named
LENGTH, PROMPT = 160, 32


@dataclass(frozen=True)
class Way:
    """One way to run. precision: of what is read on a miss; slots: kept per token and layer on average; ms_per_token: expected."""

    budget: float
    slots: float
    policy: str
    precision: str
    hit_rate: float
    reads_per_token: float
    ms_per_token: float


@dataclass(frozen=True)
class OffloadForecast(Result):
    """`best`: the largest budget that meets the target (the fastest way where none does, `met` is then false)."""

    memory: int
    slots: int
    records: int
    record_bytes: int
    bytes_per_second: float
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
    model, tokenizer = load(folder, store=StoreOptions(memory, options.expert_file, misses=Misses(low=None)))
    elastic, store = model._moe_prism, model._moe_prism.store
    if not isinstance(store, ExpertStore):
        raise UsageError(
            f"'{options.expert_file}' holds planes, which are not forecast", "run a point with `generate`, or leave it out"
        )
    budgets = options.budgets or (1.0, *affordable(elastic, BUDGETS))
    text = source_in(read_manifest(folder)["calibration"])
    windows = token_windows(tokenizer, text, "calibration", length=LENGTH, tokens=max(options.tokens, LENGTH)).ids
    with report("trace") as update, operating_point(model):
        trace = record(TraceRecorder(model, values=True), [("calibration", windows)], prompt=PROMPT, progress=update)
    here = measure_prices(store)
    forms = {"exact": (here, store.pack.layout.bytes)}
    if store.pack.has_low:
        forms["int8"] = measure_prices(store, low=True), store.pack.layout.low_bytes
    prices = {name: price.over(size / link) if link else price for name, (price, size) in forms.items()}
    ways = []
    total = slots_per_token(elastic)
    for budget in budgets:
        with operating_point(model, budget):
            step = measure_step(model, windows[:1], PROMPT, here)
        rows = at_budget(trace, elastic, budget)
        kept = float(rows.decode().slots().mean()) if budget < 1 else float(total)
        for policy in POLICIES:
            misses = replayed(rows, store.space, store.slots, cache_policies.get(policy))
            for precision, price in prices.items():
                found = misses.at(price, step)
                ways.append(Way(budget, kept, policy, precision, found.hit_rate, found.misses, found.seconds * 1e3))
    best, met = choose_way(ways, options.target_ms)
    rate = prices["exact"].bandwidth * store.pack.layout.bytes if len(store.space) > store.slots else 0.0
    store.close()
    return OffloadForecast(memory, store.slots, len(store.space), store.pack.layout.bytes, rate, best, met, ways)


def choose_way(ways: Sequence[Way], target_ms: float | None) -> tuple[Way, bool]:
    """The largest budget within the target, exact before int8, then the fastest; without one that meets it, the fastest of all."""
    fits = [w for w in ways if target_ms is None or w.ms_per_token <= target_ms]
    if not fits:
        return min(ways, key=lambda w: w.ms_per_token), False
    return max(fits, key=lambda w: (w.budget, w.precision == "exact", -w.ms_per_token)), True
