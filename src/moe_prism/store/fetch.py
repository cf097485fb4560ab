"""Fetching: the cache says what has to be read and where there is room, a reader brings it, and both are kept true when a read fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..offload.base import ExpertCache, Key, Load, Moment
from ..offload.cache.pool import LayerPools, Pool
from .fast_pool import SlotTable, TablePool
from .live_figures import LiveFigures
from .pack import Pack
from .pools import Eviction, pools
from .reader import ReadJob, RecordReader, StoreError
from .under_way import UnderWay
from .wanted import Ints, Wanted

PRICE_WEIGHT = 0.05  # of the newest wait in the price of a record


@dataclass
class Times:
    """Seconds since the last reset: `waited` for reads while nothing could be computed, `computed`; bytes read, in `reads` calls."""

    waited: float = 0.0
    computed: float = 0.0
    bytes: int = 0
    reads: int = 0

    def reset(self) -> None:
        """Begin again at nothing."""
        self.waited = self.computed = 0.0
        self.bytes = self.reads = 0


def no_room(asked: int) -> RuntimeError:
    """Of a request that was cut too large."""
    return RuntimeError(f"no room for {asked} sub-experts")


class Fetcher:
    """The cache of a store, the slots it has given out, and the reads that fill them."""

    def __init__(self, pack: Pack, slots: int, eviction: Eviction, reader: RecordReader, times: Times) -> None:
        """slots: records that fit."""
        self.pack, self.space, self.reader, self.times = pack, pack.space, reader, times
        self.places = SlotTable.new(len(self.space), slots)
        self.cache = pools(eviction, pack.space, slots, self.places)
        self.under_way = UnderWay(self.cache, reader, len(self.space), self.lose)
        self.figures = LiveFigures(self.space, self.capacities())
        self.low: set[Key] = set()  # read in int8 form when they were last read
        self.price = 0.0  # seconds a record has cost so far that was waited for, spread over the threads; 0 = nothing is known
        self.step = -1

    def moment(self, layer: int) -> Moment:
        return Moment(self.step * self.space.layers + layer, self.step, layer)

    def pool(self, layer: int) -> ExpertCache:
        """The pool that a layer uses."""
        return self.cache.pools[layer] if isinstance(self.cache, LayerPools) else self.cache

    def capacity(self, layer: int) -> int:
        """Slots of the pool that a layer uses."""
        pool = self.pool(layer)
        assert isinstance(pool, (Pool, TablePool))
        return pool.capacity

    def capacities(self) -> list[int]:
        """Slots of every layer's pool, or of the one for all."""
        return [self.capacity(layer) for layer in range(self.space.layers if isinstance(self.cache, LayerPools) else 1)]

    def _table(self, layer: int) -> TablePool | None:
        pool = self.pool(layer)
        return pool if isinstance(pool, TablePool) else None

    def request(
        self, layer: int, wanted: Wanted, low: np.ndarray | None, first: int = 0, last: int | None = None
    ) -> tuple[list[ReadJob], Ints]:
        """Request keys first..last - 1, all of them by default: the reads to wait for, and the keys they bring.

        low [E, N] bool: which of the layer's records to take in int8 form if they have to be read.
        """
        last = len(wanted) if last is None else last
        pool = self._table(layer)
        if pool is not None:
            keys = wanted.keys[first:last]
            weights = wanted.importance[first:last].astype(np.float64)
            order = np.argsort(-weights, kind="stable")
            loads, _, bypassed = pool.serve(keys[order], weights[order], self.moment(layer))
            found = np.sort(loads)  # they have the slots of their victims
        else:
            names, weigh = wanted.by_importance(first, last)
            access = self.cache.request(names, self.moment(layer), weigh)
            found, bypassed = self._placed(access.loads), np.array(access.bypassed)
        if len(bypassed):
            raise no_room(last - first)
        self.figures.note(layer, wanted.keys[first:last], len(found))
        jobs = self._read(layer, found, low)
        if self.under_way:
            # To the cache a prefetched key is resident, so it is a hit, but its record may still be on its way.
            late = self.under_way.bringing(wanted.keys[first:last].tolist())
            jobs = [*jobs, *late]
            found = np.array([*found.tolist(), *(item.key for job in late for item in job.items)], np.int64)
        return jobs, found

    def read_placed(self, layer: int, loads: Ints, keys: Ints) -> list[ReadJob]:
        """The reads to wait for of a request for keys whose loads, ascending, have their slots."""
        self.figures.note(layer, keys, len(loads))
        jobs = self._read(layer, loads, None)
        return [*jobs, *self.under_way.bringing(keys.tolist())] if self.under_way else jobs

    def prefetch(self, layer: int, keys: Sequence[Key]) -> None:
        """Begin to read keys of a layer that will run next, as far as there is room."""
        self.under_way.note_arrivals()
        now = self.moment(layer)
        self.cache.expect(layer, keys)
        pool = self._table(layer)
        if pool is not None:
            loads, _, _ = pool.serve_ahead(np.array(keys, np.int64), now)
            found = np.sort(loads)  # they have the slots of their victims
        else:
            found = self._placed(self.cache.prefetch(list(keys), now).loads)
        self.under_way.add(found.tolist(), self._read(layer, found, None, ahead=True))

    def wait(self, jobs: Sequence[ReadJob]) -> None:
        """Wait for reads. What failed leaves the cache, and the first of it is raised as a StoreError."""
        began = time.perf_counter()
        failed = self.settle(jobs)
        waited = time.perf_counter() - began
        self.times.waited += waited
        records = sum(job.count for job in jobs)
        if records:
            self.price += PRICE_WEIGHT * (waited / records - self.price) if self.price else waited / records
        if failed:
            key, reason = next(iter(failed.items()))
            raise StoreError(
                f"{self.pack.path}: {self.space.describe(key)} cannot be read: {reason}",
                "check the disk, or write the file again",
            )

    def settle(self, jobs: Sequence[ReadJob]) -> dict[Key, str]:
        """Wait for reads. What failed leaves the cache, and is returned with the reason."""
        failed: dict[Key, str] = {}
        for job in jobs:
            job.wait()
            failed |= job.failed
        for key in failed:
            self.under_way.land(key)
            if key in self.cache:
                self.lose(key)
        return failed

    def lose(self, key: Key) -> None:
        """A resident record turns out not to be there: its slot is free again."""
        self.cache.drop(key, self.moment(self.space.layer(key)))
        self.places.vacate(key)

    def _placed(self, loads: Sequence[Load]) -> Ints:
        """Keys to load, ascending, of a pool without a table, which gives out no slots."""
        for load in loads:
            self.places.place(load.key, load.victims)
        return np.array(sorted(load.key for load in loads), np.int64)

    def _read(self, layer: int, keys: Ints, low: np.ndarray | None, *, ahead: bool = False) -> list[ReadJob]:
        """Begin to read keys into their slots; low [E, N]: which of the layer's records in int8 form."""
        if not len(keys):
            return []
        layout = self.pack.layout
        lowered = None if low is None else low.reshape(-1)[keys - self.space.of_layer(layer).start]
        if self.low:
            self.low.difference_update(keys.tolist())
        if lowered is None or not lowered.any():
            jobs = list(self.reader.read(keys, self.places.of[keys], ahead=ahead))
            self.times.bytes += len(keys) * layout.bytes
        else:
            exact, small = keys[~lowered], keys[lowered]
            self.low.update(small.tolist())
            jobs = [*self.reader.read(exact, self.places.of[exact]), *self.reader.read(small, self.places.of[small], low=True)]
            self.times.bytes += len(exact) * layout.bytes + len(small) * layout.low_bytes
        self.times.reads += len(jobs)
        return jobs
