"""A pool as one table: who is there, who leaves and which slot a record gets, in one call per request.

For every policy that declares its `Ranking`. Same answers, same counts as `Pool` (tested). Other policies keep `UnitPool`. Shapes: n
records that it is for, G keys of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..offload.base import Access, CacheCounts, ExpertCache, Key, KeySpace, Load, Moment
from ..offload.cache.pool import groups_of
from ..offload.cache.ranking import BY_MIX, Ranking
from .table_worth import AskedAt, PoolOrder, add_use, nothing_counted, worth

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

NOBODY = -1
NO_WEIGHTS: Floats = np.empty(0)
REQUESTED, HITS, MISSES, LOADS, EVICTIONS, PREFETCHED, USED, WASTED = range(8)
USE, BEGAN, LAST_STEP = range(3)
NAMES = ("requested", "hits", "misses", "loads", "evictions", "prefetched", "prefetch_used", "prefetch_wasted")


class SlotTable(NamedTuple):
    """Where records lie, shared by all layers: slot of every key (negative = nowhere), and the free ones, free[1...free[0]]."""

    of: Ints
    free: Ints

    @classmethod
    def new(cls, keys: int, slots: int) -> SlotTable:
        return cls(np.full(keys, -1, np.int64), np.array([slots, *range(slots - 1, -1, -1)], np.int64))

    def vacate(self, key: Key) -> None:
        self.free[0] += 1
        self.free[self.free[0]] = self.of[key]
        self.of[key] = -1

    def place(self, key: Key, victims: Sequence[Key]) -> int:
        """A slot for a key, after its victims have left theirs."""
        for victim in victims:
            self.vacate(victim)
        slot = int(self.free[self.free[0]])
        self.free[0] -= 1
        self.of[key] = slot
        return slot


class Residency(NamedTuple):
    """Who is in a pool. Arrays are by record: record i has the key base + i."""

    base: int
    capacity: int
    used: Ints  # [n] number of the last use, negative = not resident
    counted: Floats  # [n, 3] of its uses: see `table_worth`
    pins: Ints  # [n] how often it is pinned
    expected: Flags  # [n] a prefetch does not push it out
    early: Flags  # [n] prefetched, and not requested since
    clock: (
        Ints  # [3] number of the next use (USE), the step with which the sequence began (BEGAN), that of the last use (LAST_STEP)
    )
    counts: Ints  # [8] REQUESTED ...

    @classmethod
    def new(cls, capacity: int, of: range, ranking: Ranking) -> Residency:
        """An empty pool."""
        count = len(of)
        counted = nothing_counted(count, ranking.form)
        flags = np.zeros(count, bool), np.zeros(count, bool)
        numbers = np.zeros(3, np.int64), np.zeros(len(NAMES), np.int64)
        return cls(of.start, capacity, np.full(count, -1, np.int64), counted, np.zeros(count, np.int64), *flags, *numbers)


class AskedKeys(NamedTuple):
    """One call: keys in order of importance, their routing weights, and when they are asked for."""

    keys: Ints
    weights: Floats  # a prefetch has none
    step: int
    layer: int
    ahead: bool  # a prefetch, not a request


@njit(nogil=True, cache=True)
def serve(asked: AskedKeys, pool: Residency, places: SlotTable, order: PoolOrder) -> tuple[Ints, Ints, Ints]:
    """(keys to load, the victim of each or NOBODY, keys without room); the pool and the slots are changed at once."""
    keys, used, counts = asked.keys, pool.used, pool.counts
    # What is pinned, of this very group or, for a prefetch, expected never leaves. `stuck` counts those of them that are in the pool. A key
    # that could only come in by pushing one of them out is refused before a victim is looked for, so there always is one.
    blocked = np.zeros(len(used), np.bool_)
    for key in keys:
        blocked[key - pool.base] = True
    resident, stuck = 0, 0
    for i in range(len(used)):
        blocked[i] |= pool.pins[i] > 0 or (asked.ahead and pool.expected[i])
        resident += used[i] >= 0
        stuck += used[i] >= 0 and blocked[i]
    if not asked.ahead:
        note_hits(asked, pool, order)
    loads, victims, refused = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
    count, without = 0, 0
    for g in range(len(keys)):
        key = keys[g]
        i = key - pool.base
        if used[i] >= 0:
            continue
        if not asked.ahead:
            counts[MISSES] += 1
            note_use(pool, i, asked.weights[g], order, asked.step)
        if stuck >= pool.capacity:
            refused[without] = key
            without += 1
            continue
        victims[count] = NOBODY
        if resident >= pool.capacity:
            worst = least_worth(pool, blocked, order, AskedAt(asked.step, asked.layer, pool.clock[BEGAN]))
            victims[count] = worst + pool.base
            used[worst] = -1
            counts[EVICTIONS] += 1
            counts[WASTED] += pool.early[worst]
            pool.early[worst] = False
            resident -= 1
            places.free[0] += 1
            places.free[places.free[0]] = places.of[worst + pool.base]
            places.of[worst + pool.base] = -1
        used[i] = pool.clock[USE]
        pool.clock[USE] += 1
        pool.early[i] = asked.ahead
        counts[PREFETCHED if asked.ahead else LOADS] += 1
        resident += 1
        stuck += 1
        places.of[key] = places.free[places.free[0]]
        places.free[0] -= 1
        loads[count] = key
        count += 1
    return loads[:count], victims[:count], refused[:without]


@njit(nogil=True, cache=True)
def note_hits(asked: AskedKeys, pool: Residency, order: PoolOrder) -> None:
    """A request begins. All its hits count as used before the first miss looks for a victim, as in `Pool`."""
    pool.expected[:] = False
    pool.counts[REQUESTED] += len(asked.keys)
    for g in range(len(asked.keys)):
        i = asked.keys[g] - pool.base
        if pool.used[i] >= 0:
            pool.counts[HITS] += 1
            pool.counts[USED] += pool.early[i]
            pool.early[i] = False
            if order.ranking.renews:
                pool.used[i] = pool.clock[USE]
                pool.clock[USE] += 1
            note_use(pool, i, asked.weights[g], order, asked.step)


@njit(nogil=True, cache=True)
def note_use(pool: Residency, i: int, weight: float, order: PoolOrder, step: int) -> None:
    """A record is asked for."""
    pool.clock[LAST_STEP] = step
    add_use(pool.counted, i, weight, order.ranking, step)


@njit(nogil=True, cache=True)
def least_worth(pool: Residency, blocked: Flags, order: PoolOrder, now: AskedAt) -> int:
    """The resident record to evict: the smallest worth, of equal ones the least recently used."""
    worst, least = -1, 0.0
    for v in range(len(pool.used)):
        if pool.used[v] < 0 or blocked[v]:
            continue
        own = worth(pool.counted, v, v + pool.base, order, now)
        if worst < 0 or own < least or (own == least and pool.used[v] < pool.used[worst]):
            worst, least = v, own
    return worst


class TablePool(ExpertCache):
    """One pool of `capacity` slots for the keys `of` a layer or all layers of `space`. One layer at a time expects keys.

    ranking: who leaves.
    """

    def __init__(self, capacity: int, space: KeySpace, of: range, ranking: Ranking, slots: SlotTable) -> None:
        self.capacity, self.base, self.slots = capacity, of.start, slots
        self._order = PoolOrder.of(ranking, space)
        self._pool = Residency.new(capacity, of, ranking)

    @property
    def residency(self) -> Residency:
        """Who is there; another one after `shrink`."""
        return self._pool

    @property
    def order(self) -> PoolOrder:
        """Who leaves."""
        return self._order

    def serve(self, keys: Ints, weights: Floats, now: Moment) -> tuple[Ints, Ints, Ints]:
        """A request of this pool. weights: of every key."""
        return serve(AskedKeys(keys, weights, now.step, now.layer, False), self._pool, self.slots, self._order)  # type: ignore[no-any-return]

    def serve_ahead(self, keys: Ints, now: Moment) -> tuple[Ints, Ints, Ints]:
        """A prefetch."""
        return serve(AskedKeys(keys, NO_WEIGHTS, now.step, now.layer, True), self._pool, self.slots, self._order)  # type: ignore[no-any-return]

    def _answer(self, hits: tuple[Key, ...], found: tuple[Ints, Ints, Ints]) -> Access:
        loads, victims, refused = (a.tolist() for a in found)
        made = tuple(Load(k, () if v == NOBODY else (v,)) for k, v in zip(loads, victims, strict=True))
        return Access(hits, made, tuple(refused))

    def request(self, keys: Sequence[Key], now: Moment, weights: Sequence[float] | None = None) -> Access:
        weigh = np.ones(len(keys)) if weights is None else np.array(weights, np.float64)
        hits = tuple(k for k in keys if k in self)
        return self._answer(hits, self.serve(np.array(keys, np.int64), weigh, now))

    def prefetch(self, keys: Sequence[Key], now: Moment) -> Access:
        hits = tuple(k for k in keys if k in self)
        return self._answer(hits, self.serve_ahead(np.array(keys, np.int64), now))

    def chunks(self, keys: Sequence[Key], layer: int) -> list[list[Key]]:
        there = {k for k in keys if k in self}
        ordered = [k for k in keys if k in there] + [k for k in keys if k not in there]
        fixed = int(((self._pool.pins > 0) & (self._pool.used >= 0)).sum())
        return groups_of(ordered, lambda key: int(self._pool.pins[key - self.base] == 0), self.capacity - fixed)

    def expect(self, layer: int, keys: Iterable[Key]) -> None:
        self._pool.expected[:] = False
        for key in keys:
            self._pool.expected[key - self.base] = True

    def hint(self, layer: int, scores: Sequence[float], now: Moment) -> None:
        """A store gives none, so a table has no place for them."""

    def pin(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._pool.pins[key - self.base] += 1

    def unpin(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._pool.pins[key - self.base] -= 1

    def drop(self, key: Key, now: Moment) -> None:
        """The key's slot stays taken until its owner vacates it."""
        i = key - self.base
        if self._pool.used[i] < 0:
            raise ValueError(f"key {key} is not resident")
        self._pool.counts[EVICTIONS] += 1
        self._pool.counts[WASTED] += self._pool.early[i]
        self._pool.used[i], self._pool.early[i] = -1, False

    def shrink(self, capacity: int) -> list[Key]:
        """Have fewer slots from now on; the keys that leave for that, used longest ago first. What is pinned stays."""
        pool = self._pool
        self.capacity, self._pool = capacity, pool._replace(capacity=capacity)
        resident = np.flatnonzero(pool.used >= 0)
        order = resident[np.argsort(pool.used[resident], kind="stable")]
        leaving = order[pool.pins[order] == 0][: max(0, len(resident) - capacity)]
        pool.counts[EVICTIONS] += len(leaving)
        pool.counts[WASTED] += int(pool.early[leaving].sum())
        pool.used[leaving], pool.early[leaving] = -1, False
        return [int(i) + self.base for i in leaving]

    def new_sequence(self) -> None:
        if self._order.ranking.form == BY_MIX:  # the only one that keeps anything per sequence
            self._pool.counted[:] = nothing_counted(len(self._pool.used), BY_MIX)
            self._pool.clock[BEGAN] = self._pool.clock[LAST_STEP] + 1

    def foresee(self, uses: Mapping[Key, Sequence[int]]) -> None:
        """No table knows the future."""

    def __contains__(self, key: object) -> bool:
        return (
            isinstance(key, int) and 0 <= key - self.base < len(self._pool.used) and bool(self._pool.used[key - self.base] >= 0)
        )

    def __len__(self) -> int:
        return int((self._pool.used >= 0).sum())

    @property
    def pinned(self) -> set[Key]:
        return {int(i) + self.base for i in np.flatnonzero(self._pool.pins)}

    @property
    def counts(self) -> CacheCounts:
        """What was asked, found and loaded so far."""
        named = dict(zip(NAMES, self._pool.counts.tolist(), strict=True))
        sizes = {"requested_bytes": "requested", "hit_bytes": "hits", "missed_bytes": "misses", "prefetched_bytes": "prefetched"}
        return CacheCounts(**named, **{name: named[same] for name, same in sizes.items()})
