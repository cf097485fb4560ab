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


class Fetched(NamedTuple):
    """What a request has to load, in key order: keys, their new slots; and who left for them (some NOBODY)."""

    keys: Ints
    slots: Ints
    victims: Ints


@njit(nogil=True, cache=True)
def serve(
    keys: Ints, base: int, capacity: int, ahead: bool, half_life: float, step: int, layer: int, width: int, layers: int,
    used: Ints, rank: NDArray[np.float64], pinned: Ints, expected: Flags, early: Flags, counts: Ints, clock: Ints, slot: Ints, free: Ints,
) -> tuple[Ints, Ints, Ints]:  # fmt: skip
    """Request or prefetch (`ahead`) keys, in order of importance: (keys to load, their victims, keys without room).

    used [n]: number of the last use, negative = not resident; rank [n]: log2 of the aged count (`Aged`) where half_life > 0, the count
    where width > 0: the keys of a layer, whose distance it is then divided by (`EdgeMoE`).
    """
    blocked = np.zeros(len(used), np.bool_)
    for key in keys:
        blocked[key - base] = True
    resident, stuck = 0, 0
    for i in range(len(used)):
        blocked[i] |= pinned[i] > 0 or (ahead and expected[i])
        resident += used[i] >= 0
        stuck += used[i] >= 0 and blocked[i]
    loads, victims, refused = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
    count, without = 0, 0
    if not ahead:
        expected[:] = False
        counts[REQUESTED] += len(keys)
        for key in keys:
            i = key - base
            if used[i] >= 0:
                counts[HITS] += 1
                counts[USED] += early[i]
                early[i] = False
                used[i] = clock[0]
                clock[0] += 1
                add_use(rank, i, half_life, step, width)
    for key in keys:
        i = key - base
        if used[i] >= 0:
            continue
        if not ahead:
            counts[MISSES] += 1
            add_use(rank, i, half_life, step, width)
        if stuck >= capacity:
            refused[without] = key
            without += 1
            continue
        victims[count] = NOBODY
        if resident >= capacity:
            worst, least = -1, 0.0
            for v in range(len(used)):
                if used[v] < 0 or blocked[v]:
                    continue
                worth = rank[v]
                if width > 0:
                    distance = ((v + base) // width - layer) % layers
                    worth /= distance if distance > 0 else layers
                if worst < 0 or worth < least or (worth == least and used[v] < used[worst]):
                    worst, least = v, worth
            victims[count] = worst + base
            used[worst] = -1
            counts[EVICTIONS] += 1
            counts[WASTED] += early[worst]
            early[worst] = False
            resident -= 1
            free[0] += 1
            free[free[0]] = slot[worst + base]
            slot[worst + base] = -1
        used[i] = clock[0]
        clock[0] += 1
        early[i] = ahead
        counts[PREFETCHED if ahead else LOADS] += 1
        resident += 1
        stuck += 1
        slot[key] = free[free[0]]
        free[0] -= 1
        loads[count] = key
        count += 1
    return loads[:count], victims[:count], refused[:without]


@njit(nogil=True, cache=True)
def add_use(rank: NDArray[np.float64], i: int, half_life: float, step: int, width: int) -> None:
    """`Aged.add` of one use; of plain counts where width > 0."""
    if width > 0:
        rank[i] += 1
    elif half_life > 0:
        new = step / half_life
        if rank[i] == -np.inf:
            rank[i] = new
        else:
            rank[i] = max(rank[i], new) + math.log2(1 + 2.0 ** -abs(rank[i] - new))


class TablePool(ExpertCache):
    """One pool of `capacity` slots for the keys `of` a layer or all layers, under one of POLICIES. One layer at a time expects keys."""

    def __init__(self, capacity: int, space: KeySpace, of: range, policy: CachePolicy, slots: SlotTable) -> None:
        self.capacity, self.base, self.slots = capacity, of.start, slots
        self._half_life = policy._uses.half_life if isinstance(policy, LFU) else 0.0
        self._width, self._layers = (space.experts * space.parts if isinstance(policy, EdgeMoE) else 0), space.layers
        self._used, self._rank = np.full(len(of), -1, np.int64), np.full(len(of), -np.inf if self._half_life else 0.0)
        self._pins, self._expected, self._early = np.zeros(len(of), np.int64), np.zeros(len(of), bool), np.zeros(len(of), bool)
        self._numbers, self._clock = np.zeros(len(NAMES), np.int64), np.zeros(1, np.int64)

    def serve(self, keys: Ints, now: Moment, ahead: bool = False) -> tuple[Ints, Ints, Ints]:
        """`serve` on this pool."""
        return serve(  # type: ignore[no-any-return]
            keys, self.base, self.capacity, ahead, self._half_life, now.step, now.layer, self._width, self._layers, self._used,
            self._rank, self._pins, self._expected, self._early, self._numbers, self._clock, self.slots.of, self.slots.free,
        )  # fmt: skip

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
        fixed = int(((self._pins > 0) & (self._used >= 0)).sum())
        return groups_of(ordered, lambda key: int(self._pins[key - self.base] == 0), self.capacity - fixed)

    def expect(self, layer: int, keys: Iterable[Key]) -> None:
        self._expected[:] = False
        for key in keys:
            self._expected[key - self.base] = True

    def hint(self, layer: int, scores: Sequence[float], now: Moment) -> None:
        """Neither policy listens."""

    def pin(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._pins[key - self.base] += 1

    def unpin(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._pins[key - self.base] -= 1

    def drop(self, key: Key, now: Moment) -> None:
        """The key's slot stays taken until its owner vacates it."""
        i = key - self.base
        if self._used[i] < 0:
            raise ValueError(f"key {key} is not resident")
        self._numbers[EVICTIONS] += 1
        self._numbers[WASTED] += self._early[i]
        self._used[i], self._early[i] = -1, False

    def new_sequence(self) -> None:
        """Neither policy keeps anything per sequence."""

    def foresee(self, uses: Mapping[Key, Sequence[int]]) -> None:
        """Neither policy knows the future."""

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and 0 <= key - self.base < len(self._used) and bool(self._used[key - self.base] >= 0)

    def __len__(self) -> int:
        return int((self._used >= 0).sum())

    @property
    def pinned(self) -> set[Key]:
        return {int(i) + self.base for i in np.flatnonzero(self._pins)}

    @property
    def counts(self) -> CacheCounts:
        named = dict(zip(NAMES, self._numbers.tolist(), strict=True))
        sizes = {"requested_bytes": "requested", "hit_bytes": "hits", "missed_bytes": "misses", "prefetched_bytes": "prefetched"}
        return CacheCounts(**named, **{name: named[same] for name, same in sizes.items()})
