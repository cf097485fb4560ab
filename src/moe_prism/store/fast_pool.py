"""A pool under `lru`, `lfu` or `edge-moe` as one table: who is there, who leaves and which slot a record gets, in one call per request.

Same answers, same counts as `Pool` (tested). Other policies keep `UnitPool`. Shapes: n records that it is for, G keys of a request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ..offload.base import Access, CacheCounts, CachePolicy, ExpertCache, Key, KeySpace, Load, Moment
from ..offload.cache.edge_moe import EdgeMoE
from ..offload.cache.lfu import LFU
from ..offload.cache.lru import LRU
from ..offload.cache.pool import groups_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

POLICIES = (LRU, LFU, EdgeMoE)
NOBODY = -1
REQUESTED, HITS, MISSES, LOADS, EVICTIONS, PREFETCHED, USED, WASTED = range(8)
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


BY_RECENCY, BY_AGED_COUNT, BY_COUNT_OVER_DISTANCE = range(3)


class Ranking(NamedTuple):
    """What makes a resident record worth keeping: the policy, as compiled code wants it."""

    kind: int  # BY_RECENCY (`LRU`), BY_AGED_COUNT (`LFU`), BY_COUNT_OVER_DISTANCE (`EdgeMoE`)
    half_life: float  # steps in which a count halves; of BY_AGED_COUNT
    layer_keys: int  # keys of a layer: the distance to a record's layer is counted in layers
    layers: int

    @classmethod
    def of(cls, policy: CachePolicy, space: KeySpace) -> Ranking:
        """`policy` is one of POLICIES."""
        keys = space.experts * space.parts
        if isinstance(policy, LFU):
            return cls(BY_AGED_COUNT, float(policy._uses.half_life), keys, space.layers)
        return cls(BY_COUNT_OVER_DISTANCE if isinstance(policy, EdgeMoE) else BY_RECENCY, 0.0, keys, space.layers)


class Residency(NamedTuple):
    """Who is in a pool. Arrays are by record: record i has the key base + i."""

    base: int
    capacity: int
    used: Ints  # [n] number of the last use, negative = not resident
    rank: Floats  # [n] what `Ranking` counts: log2 of the aged count as in `Aged`, or the plain count
    pins: Ints  # [n] how often it is pinned
    expected: Flags  # [n] a prefetch does not push it out
    early: Flags  # [n] prefetched, and not requested since
    clock: Ints  # [1] number of the next use
    counts: Ints  # [8] REQUESTED ...

    @classmethod
    def new(cls, capacity: int, of: range, ranking: Ranking) -> Residency:
        """An empty pool."""
        count = len(of)
        rank = np.full(count, -np.inf if ranking.kind == BY_AGED_COUNT else 0.0)
        flags = np.zeros(count, bool), np.zeros(count, bool)
        numbers = np.zeros(1, np.int64), np.zeros(len(NAMES), np.int64)
        return cls(of.start, capacity, np.full(count, -1, np.int64), rank, np.zeros(count, np.int64), *flags, *numbers)


class AskedKeys(NamedTuple):
    """One call: keys in order of importance, and when they are asked for."""

    keys: Ints
    step: int
    layer: int
    ahead: bool  # a prefetch, not a request


@njit(nogil=True, cache=True)
def serve(asked: AskedKeys, pool: Residency, places: SlotTable, ranking: Ranking) -> tuple[Ints, Ints, Ints]:
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
        note_hits(asked, pool, ranking)
    loads, victims, refused = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
    count, without = 0, 0
    for key in keys:
        i = key - pool.base
        if used[i] >= 0:
            continue
        if not asked.ahead:
            counts[MISSES] += 1
            add_use(pool.rank, i, ranking, asked.step)
        if stuck >= pool.capacity:
            refused[without] = key
            without += 1
            continue
        victims[count] = NOBODY
        if resident >= pool.capacity:
            worst = least_worth(pool, blocked, ranking, asked.layer)
            victims[count] = worst + pool.base
            used[worst] = -1
            counts[EVICTIONS] += 1
            counts[WASTED] += pool.early[worst]
            pool.early[worst] = False
            resident -= 1
            places.free[0] += 1
            places.free[places.free[0]] = places.of[worst + pool.base]
            places.of[worst + pool.base] = -1
        used[i] = pool.clock[0]
        pool.clock[0] += 1
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
def note_hits(asked: AskedKeys, pool: Residency, ranking: Ranking) -> None:
    """A request begins. All its hits count as used before the first miss looks for a victim, as in `Pool`."""
    pool.expected[:] = False
    pool.counts[REQUESTED] += len(asked.keys)
    for key in asked.keys:
        i = key - pool.base
        if pool.used[i] >= 0:
            pool.counts[HITS] += 1
            pool.counts[USED] += pool.early[i]
            pool.early[i] = False
            pool.used[i] = pool.clock[0]
            pool.clock[0] += 1
            add_use(pool.rank, i, ranking, asked.step)


@njit(nogil=True, cache=True)
def least_worth(pool: Residency, blocked: Flags, ranking: Ranking, layer: int) -> int:
    """The resident record to evict: the smallest worth, of equal ones the least recently used. By recency all are worth the same."""
    worst, least = -1, 0.0
    for v in range(len(pool.used)):
        if pool.used[v] < 0 or blocked[v]:
            continue
        worth = pool.rank[v]
        if ranking.kind == BY_COUNT_OVER_DISTANCE:
            # The layer that has just run comes again only after all others: its distance is that of a whole step, not nothing.
            distance = ((v + pool.base) // ranking.layer_keys - layer) % ranking.layers
            worth /= distance if distance > 0 else ranking.layers
        if worst < 0 or worth < least or (worth == least and pool.used[v] < pool.used[worst]):
            worst, least = v, worth
    return worst


@njit(nogil=True, cache=True)
def add_use(rank: Floats, i: int, ranking: Ranking, step: int) -> None:
    """Count one use of a record."""
    if ranking.kind == BY_COUNT_OVER_DISTANCE:
        rank[i] += 1
    elif ranking.kind == BY_AGED_COUNT:
        # As `Aged.add`: the logarithm of a sum, and a use now weighs 2^(step / half_life). So old counts never have to be
        # scaled down, and the larger of two numbers is the larger count at any step.
        new = step / ranking.half_life
        if rank[i] == -np.inf:
            rank[i] = new
        else:
            rank[i] = max(rank[i], new) + math.log2(1 + 2.0 ** -abs(rank[i] - new))


class TablePool(ExpertCache):
    """One pool of `capacity` slots for the keys `of` a layer or all layers, under one of POLICIES. One layer at a time expects keys."""

    def __init__(self, capacity: int, space: KeySpace, of: range, policy: CachePolicy, slots: SlotTable) -> None:
        self.capacity, self.base, self.slots = capacity, of.start, slots
        self._ranking = Ranking.of(policy, space)
        self._pool = Residency.new(capacity, of, self._ranking)

    @property
    def residency(self) -> Residency:
        """Who is there; another one after `shrink`."""
        return self._pool

    @property
    def ranking(self) -> Ranking:
        """Who leaves."""
        return self._ranking

    def serve(self, keys: Ints, now: Moment, ahead: bool = False) -> tuple[Ints, Ints, Ints]:
        """`serve` on this pool."""
        return serve(AskedKeys(keys, now.step, now.layer, ahead), self._pool, self.slots, self._ranking)  # type: ignore[no-any-return]

    def _access(self, keys: Sequence[Key], now: Moment, ahead: bool) -> Access:
        hits = tuple(k for k in keys if k in self)
        loads, victims, refused = (a.tolist() for a in self.serve(np.array(keys, np.int64), now, ahead))
        found = tuple(Load(k, () if v == NOBODY else (v,)) for k, v in zip(loads, victims, strict=True))
        return Access(hits, found, tuple(refused))

    def request(self, keys: Sequence[Key], now: Moment, weights: Sequence[float] | None = None) -> Access:
        return self._access(keys, now, False)

    def prefetch(self, keys: Sequence[Key], now: Moment) -> Access:
        return self._access(keys, now, True)

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
        """Neither policy listens."""

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
        """Neither policy keeps anything per sequence."""

    def foresee(self, uses: Mapping[Key, Sequence[int]]) -> None:
        """Neither policy knows the future."""

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
