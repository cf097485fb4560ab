"""Run a trace through a cache: what a policy would have done with the same routing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import UsageError
from .base import Access, CacheCounts, CachePolicy, ExpertCache, Key, KeySpace, Moment
from .cache.pool import LayerPools, Pool
from .trace import Array, Trace

Hints = np.ndarray
"""[T, L, E] scores of every layer's experts, handed to the policy before the layer's request of the row's step."""


@dataclass(frozen=True)
class Prefetch:
    """Before a layer's request, make resident what was predicted for it.

    scores [T, L, n]: of every layer's experts, or of its keys where they are sub-experts; several tokens of a step add up.
    width: keys wanted per layer; first_layer: no prediction before it.
    """

    scores: Array
    width: int
    first_layer: int = 0

    def keys(self, group: Group, space: KeySpace) -> list[Key]:
        """The best keys for a group, best first."""
        if group.layer < self.first_layer or self.width < 1:
            return []
        scores = self.scores[group.first_row : group.last_row, group.layer].sum(0)
        best = np.argsort(-scores, kind="stable")[: self.width]
        return (best + space.of_layer(group.layer).start).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Group:
    """What one step needs at one layer: distinct keys, largest routing weight first."""

    step: int
    layer: int
    keys: list[Key]
    weights: list[float]
    first_row: int
    last_row: int  # exclusive
    fresh: bool  # a request of a user begins with this step


def groups(trace: Trace, space: KeySpace) -> Iterator[Group]:
    """The groups of a trace in the order of computation, steps numbered from 0."""
    bounds = np.flatnonzero(np.r_[True, np.diff(trace.step) != 0, True])
    batch_one = trace.request.min() == trace.request.max() or _one_at_a_time(trace)
    for step, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        fresh = batch_one and (first == 0 or trace.request[first] != trace.request[first - 1])
        for layer in range(space.layers):
            keys, weights = _needed(trace, space, layer, first, last)
            yield Group(step, layer, keys, weights, first, last, bool(fresh))


def _one_at_a_time(trace: Trace) -> bool:
    return bool((np.diff(trace.request) >= 0).all())


def _needed(trace: Trace, space: KeySpace, layer: int, first: int, last: int) -> tuple[list[Key], list[float]]:
    ids = trace.expert_ids[first:last, layer].astype(np.int64)
    weights = np.abs(trace.weights[first:last, layer].astype(np.float64))
    valid = ids >= 0
    if space.parts == 1:
        if trace.kept is not None:  # an expert of which no sub-expert is kept is not read
            valid &= trace.kept[first:last, layer] != 0
        keys, weights = ids[valid] + layer * space.experts, weights[valid]
    else:
        kept = np.full(ids.shape, (1 << space.parts) - 1) if trace.kept is None else trace.kept[first:last, layer]
        on = ((kept[..., None] >> np.arange(space.parts)) & 1).astype(bool) & valid[..., None]
        whole = ((ids + layer * space.experts)[..., None] * space.parts + np.arange(space.parts))[on]
        keys, weights = whole, np.broadcast_to(weights[..., None], on.shape)[on]
    order = np.lexsort((keys, -weights))
    keys, weights = keys[order], weights[order]
    _, once = np.unique(keys, return_index=True)  # the first of each key carries its largest weight
    once.sort()
    return keys[once].tolist(), weights[once].tolist()


def uses_by_step(trace: Trace, space: KeySpace, layer: int) -> tuple[Array, Array]:
    """used [S, keys of a layer] 0/1 for every step, and rows [S] the last row of each step."""
    bounds = np.flatnonzero(np.r_[True, np.diff(trace.step) != 0, True])
    base = space.of_layer(layer).start
    used = np.zeros((len(bounds) - 1, len(space.of_layer(layer))))
    for step, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        used[step, np.array(_needed(trace, space, layer, first, last)[0], dtype=np.int64) - base] = 1
    return used, bounds[1:] - 1


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """How a replay's cache is built, and what it is told beforehand.

    space: whole experts by default; shared: one pool for all layers; size_of: bytes of a key, where keys differ; seed, settings: of the
    policy; order: the trace's groups, where the caller has them already; hints: for the policy; prefetch: keys read ahead of a layer.
    """

    space: KeySpace | None = None
    shared: bool = False
    size_of: Callable[[Key], int] | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    order: Sequence[Group] | None = None
    hints: Hints | None = None
    prefetch: Prefetch | None = None


def make_cache(
    maker: type[CachePolicy], space: KeySpace, slots: int | Sequence[int], options: ReplayOptions | None = None
) -> ExpertCache:
    """A cache of `slots` units per layer (one number, or one per layer); where `shared`, one pool of their sum instead.

    Units are slots, or bytes where `size_of` gives the bytes of a key.
    """
    options = options or ReplayOptions()
    size_of = options.size_of
    quotas = [slots] * space.layers if isinstance(slots, int) else list(slots)
    if len(quotas) != space.layers or min(quotas) < 0:
        raise UsageError(f"{len(quotas)} quotas for {space.layers} layers", "give one positive number per layer")
    smallest = 1 if size_of is None else max(1, min(size_of(key) for key in range(len(space))))

    def policy(_layer: int, capacity: int) -> CachePolicy:
        return maker(space, capacity // smallest, size_of=size_of, seed=options.seed, **options.settings)

    return Pool(sum(quotas), policy(0, sum(quotas))) if options.shared else LayerPools(quotas, policy)


def serve(cache: ExpertCache, group: Group, layers: int) -> list[Access]:
    """One group through a cache, in pieces where it is larger than the cache."""
    now = Moment(group.step * layers + group.layer, group.step, group.layer)
    weights = dict(zip(group.keys, group.weights, strict=True))
    return [cache.request(keys, now, [weights[k] for k in keys]) for keys in cache.chunks(group.keys, group.layer)]


def replay(
    trace: Trace, policy: type[CachePolicy], slots: int | Sequence[int], options: ReplayOptions | None = None
) -> CacheCounts:
    """CacheCounts of a policy on a trace. slots: per layer, one number for all or one each. UsageError for other quotas."""
    options = options or ReplayOptions()
    space, hints, prefetch = options.space or trace.space, options.hints, options.prefetch
    work = list(groups(trace, space)) if options.order is None else options.order
    cache = make_cache(policy, space, slots, options)
    if policy.needs_future:
        cache.foresee(clocks(work, space.layers))
    if hints is not None:
        hints = hints.astype(float)
    for group in work:
        if group.fresh and group.layer == 0:
            cache.new_sequence()
        now = Moment(group.step * space.layers + group.layer, group.step, group.layer)
        if prefetch is not None:
            wanted = prefetch.keys(group, space)
            cache.expect(group.layer, wanted)
            cache.prefetch(wanted, now)
        if hints is not None:
            cache.hint(group.layer, hints[group.first_row : group.last_row, group.layer].mean(0).tolist(), now)
        serve(cache, group, space.layers)
    return cache.counts


def interleave(trace: Trace, batch: int) -> Trace:
    """The same requests decoded `batch` at a time: step j of a batch holds the j-th step of each of its requests."""
    if batch < 1:
        raise UsageError(f"a batch of {batch} requests is impossible", "give at least 1")
    requests, which = np.unique(trace.request, return_inverse=True)
    first = np.full(len(requests), np.iinfo(np.int64).max)
    np.minimum.at(first, which, trace.step)
    stage = trace.step - first[which]
    group = which // batch
    order = np.lexsort((which, stage, group))
    changed = (np.diff(group[order]) != 0) | (np.diff(stage[order]) != 0)
    step = np.r_[0, np.cumsum(changed)].astype(np.int32)
    return replace(trace.rows(order), step=step)


def clocks(work: Sequence[Group], layers: int) -> dict[Key, list[int]]:
    """When every key is requested, for `foresee`."""
    found: dict[Key, list[int]] = {}
    for group in work:
        for key in group.keys:
            found.setdefault(key, []).append(group.step * layers + group.layer)
    return found
