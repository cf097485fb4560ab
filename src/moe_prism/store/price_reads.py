"""What a store would cost per token, without running it: a trace replayed through the same cache, with the measured price of reads.

A step takes what it takes apart from reads, plus for every layer the price of the records it has to read at once. Both are measured on the
store itself: the price of n missing records is the time of a request with n misses less that of the same request again; what a step takes
besides is the time of real steps less the price of what they missed. (A repeated step, which misses nothing, is too fast: its weights are
still in the processor's cache.)
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache_names import cache_argument, made_cache
from ..elastic.bind import bind
from ..offload.base import KeySpace, Moment
from ..offload.cache.pool import LayerPools
from ..offload.replay import Group, Prefetch, clocks, groups, serve
from ..offload.timeline import step_time
from ..offload.trace import Trace
from ..point import FULL
from .pools import Eviction, pools
from .store import ExpertStore

if TYPE_CHECKING:
    from .layer import StoredElastic

COUNTS = (1, 2, 4, 8, 16, 32)
REPEATS = 7


@dataclass(frozen=True)
class ReadPrices:
    """seconds[i]: what counts[i] records cost that a layer has to read at once.

    busy[i]: of them, what the computing thread works to begin and to check the reads; nothing: none is known.
    """

    counts: Sequence[int]
    seconds: Sequence[float]
    busy: Sequence[float] = ()

    def of(self, missing: float) -> float:
        """Linear between the measured counts and beyond the last two."""
        return self._at(self.seconds, missing)

    def work(self, count: float) -> float:
        """Of `of(count)`, the computing thread's own part."""
        return min(self._at(self.busy, count), self.of(count)) if self.busy else 0.0

    def _at(self, s: Sequence[float], missing: float) -> float:
        if missing <= 0:
            return 0.0
        n = self.counts
        if missing > n[-1]:
            slope = (s[-1] - s[-2]) / (n[-1] - n[-2]) if len(n) > 1 else s[-1] / n[-1]
            return s[-1] + slope * (missing - n[-1])
        return float(np.interp(missing, [0, *n], [0.0, *s]))

    def over(self, seconds_per_record: float) -> ReadPrices:
        """The same behind a link that takes so long for each record."""
        slow = [max(s, n * seconds_per_record) for n, s in zip(self.counts, self.seconds, strict=True)]
        return ReadPrices(self.counts, slow, self.busy)

    @property
    def bandwidth(self) -> float:
        """Records per second when many are read at once."""
        return self.counts[-1] / self.seconds[-1]


def measure_prices(store: ExpertStore, *, low: bool = False, seed: int = 0) -> ReadPrices:
    """Time requests of n absent records against the same requests when they are there; medians of REPEATS."""
    draw, space = random.Random(seed), store.space  # noqa: S311 - which records are timed
    capacity = store.capacity(0)
    counts, seconds, busy = [], [], []
    for count in [n for n in COUNTS if n <= min(capacity, space.experts * space.parts)]:
        found = []
        for _ in range(REPEATS + 1):
            layer = draw.randrange(space.layers)
            resident = store.resident(layer).reshape(-1)
            # whole experts: a token wants several sub-experts of one, and neighbours are read together
            experts = draw.sample(range(space.experts), space.experts)
            chosen = [n for e in experts for n in range(e * space.parts, (e + 1) * space.parts) if not resident[n]][:count]
            if len(chosen) < count:
                break
            cold, warm = (_request(store, layer, chosen, low) for _ in range(2))
            found.append((cold[0] - warm[0], cold[1] - warm[1]))
        if len(found) > 1:
            counts.append(count)
            seconds.append(max(1e-7, statistics.median(wall for wall, _ in found[1:])))
            busy.append(max(0.0, statistics.median(work for _, work in found[1:])))
    if not counts:
        return ReadPrices([1], [0.0])  # everything is resident: nothing is ever read
    return ReadPrices(counts, list(np.maximum.accumulate(seconds)), list(np.maximum.accumulate(busy)))


def _request(store: ExpertStore, layer: int, numbers: Sequence[int], low: bool) -> tuple[float, float]:
    """(seconds, of which this thread worked) of one token's request for these records of a layer."""
    space = store.space
    experts = sorted({n // space.parts for n in numbers})
    keep = torch.zeros(1, len(experts), space.parts, dtype=torch.bool)
    for n in numbers:
        keep[0, experts.index(n // space.parts), n % space.parts] = True
    form = None
    if low:
        form = np.zeros((space.experts, space.parts), bool)
        form.reshape(-1)[list(numbers)] = True
    x, weight = torch.randn(1, store.pack.layout.hidden), torch.ones(1, len(experts))
    began, own = time.perf_counter(), time.thread_time()
    store.run(layer, x, store.wanted(layer, torch.tensor([experts]), weight, keep), low=form)
    return time.perf_counter() - began, time.thread_time() - own


@torch.no_grad()
def measure_step(model: Any, ids: Tensor, prompt: int, prices: ReadPrices) -> float:
    """Seconds of a decode step apart from its reads: mean over the steps that decode ids [B, n] after their first `prompt` tokens.

    The first of several texts warms up and is not timed. A single one is decoded twice, and timed the second time.
    """
    store, found = model._moe_prism.store, []
    for number, row in enumerate(ids if len(ids) > 1 else [ids[0], ids[0]]):
        past = cache_argument(model, made_cache(model(input_ids=row[None, :prompt], use_cache=True)))
        for i in range(prompt, len(row)):
            before = _missed(store)
            began = time.perf_counter()
            model(input_ids=row[None, i : i + 1], use_cache=True, **past)  # the cache grows in place
            seconds = time.perf_counter() - began
            if number:
                found.append(seconds - sum(prices.of(n) for n in _missed(store) - before))
    return max(0.0, statistics.fmean(found))


def _missed(store: ExpertStore) -> NDArray[np.float64]:
    """Misses so far of each layer; of one pool for all layers, equal shares."""
    cache = store.cache
    if isinstance(cache, LayerPools):
        return np.array([pool.counts.misses for pool in cache.pools], np.float64)
    return np.full(store.space.layers, cache.counts.misses / store.space.layers)


def at_budget(trace: Trace, elastic: StoredElastic, budget: float) -> Trace:
    """The trace, recorded with `values` at full budget, as the threshold rule would keep slots at a budget of bytes, held for nobody."""
    if trace.values is None:
        return trace
    dials = bind(elastic, [FULL.with_budget(budget, control="none")]).groups[0].budgets[0]
    levels = [
        layer.rule("threshold").level(torch.tensor([dial])).item()  # type: ignore[attr-defined]
        for layer, dial in zip(elastic.layers, dials, strict=True)
    ]
    values = trace.values.astype(np.float32)
    keep = values >= np.array(levels, np.float32)[None, :, None, None]
    keep |= values >= values.max((2, 3), keepdims=True)
    bits = (keep.astype(np.uint32) << np.arange(trace.n_sub, dtype=np.uint32)).sum(3).astype(np.uint32)
    return replace(trace, kept=bits)


@dataclass(frozen=True)
class Forecast:
    """Means per decode step. reads: records, on demand and ahead; deciding: of `seconds`, what policy and predictor take themselves."""

    seconds: float
    reads: float
    hit_rate: float
    deciding: float = 0.0

    def with_deciding(self, seconds: float) -> Forecast:
        """So much more: nothing is read meanwhile, so nothing hides behind it."""
        return replace(self, seconds=self.seconds + seconds, deciding=self.deciding + seconds)


@dataclass(frozen=True)
class Replayed:
    """What a cache has to read, per step and layer. lost: on demand; ahead: before the layer asks; hit_rate: of what was asked for."""

    lost: NDArray[np.int64]  # [S, L]
    ahead: NDArray[np.int64]  # [S, L]
    hit_rate: float

    def at(self, prices: ReadPrices, step_seconds: float) -> Forecast:
        """step_seconds: of a step apart from its reads, of which every layer takes an equal part."""
        most = int(max(self.lost.max(), self.ahead.max())) + 1
        price, work = (np.array([of(n) for n in range(most)]) for of in (prices.of, prices.work))
        layer = step_seconds / self.lost.shape[1]
        times = [
            step_time(layer, price[a].tolist(), price[m].tolist(), work[a].tolist())
            for a, m in zip(self.ahead, self.lost, strict=True)
        ]
        reads = float(self.lost.sum() + self.ahead.sum()) / len(self.lost)
        return Forecast(statistics.fmean(times), reads, self.hit_rate)


def replayed(
    trace: Trace | Sequence[Group],
    space: KeySpace,
    slots: int,
    eviction: Eviction,
    prefetch: Prefetch | None = None,
    uncounted: Collection[int] = (),
) -> Replayed:
    """Replay the decode rows of a trace, or groups of one, through the cache that a store of this many slots has.

    prefetch: what is read ahead of every layer but the first, while the one before computes. uncounted: steps that change the cache alone.
    """
    work = list(groups(trace.decode(), space)) if isinstance(trace, Trace) else trace
    cache = pools(eviction, space, slots)
    if eviction.policy.needs_future:
        cache.foresee(clocks(work, space.layers))
    lost = np.zeros((work[-1].step + 1, space.layers), np.int64)
    early = np.zeros_like(lost)
    counts = np.ones(len(lost), bool)
    counts[list(uncounted)] = False
    hits = requested = 0
    for group in work:
        if prefetch is not None and group.layer:
            guessed = prefetch.keys(group, space)
            cache.expect(group.layer, guessed)
            now = Moment(group.step * space.layers + group.layer, group.step, group.layer)
            early[group.step, group.layer] = len(cache.prefetch(guessed, now).loads)
        answers = serve(cache, group, space.layers)
        lost[group.step, group.layer] += sum(len(access.loads) + len(access.bypassed) for access in answers)
        if counts[group.step]:
            hits += sum(len(access.hits) for access in answers)
            requested += len(group.keys)
    return Replayed(lost[counts], early[counts], hits / requested if requested else 1.0)
