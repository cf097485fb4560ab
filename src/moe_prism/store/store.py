"""The store: the sub-experts of a model on disk, as many of them as fit in an arena, and the computation of whatever a step asks for.

Shapes: T tokens, k experts per token, N parts per expert, d hidden. One thread runs a store; reading happens on others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import MoELayer
from ..offload.base import CachePolicy, ExpertCache, Key, Load, Moment
from ..offload.cache.pool import LayerPools, Pool
from .aio_reader import SMALL_RECORD, open_reader
from .arena import Arena
from .fast_pool import SlotTable, TablePool
from .pack import Pack
from .pools import pools
from .reader import ReadJob, RecordReader, StoreError
from .wanted import Floats, Ints, Wanted, add_rows

ENTRIES = 1 << 20  # numbers of partial outputs held at a time
TOGETHER = 1 << 14  # multiplications that are not worth a turn of their own while reads are under way
AHEAD = 3  # pieces of a long prompt that are read while one is computed; of small records one, their pieces are short enough
MANY = 4  # times what fits: from there on nothing is kept for later pieces, larger ones are worth more
PRICE = 0.05  # weight of the newest wait in the price of a record


@dataclass
class Times:
    """Seconds since the last reset: `waited` for reads while nothing could be computed, `computed`; bytes read, in `reads` calls."""

    waited: float = 0.0
    computed: float = 0.0
    bytes: int = 0
    reads: int = 0


class ExpertStore:
    """`run` gives what an in-memory executor would, from records that are read when they are missing.

    The result does not depend on what was resident: every sub-expert's output is computed alone and they are added in key order.
    """

    def __init__(
        self,
        pack: Pack,
        slots: int,
        like: MoELayer,
        policy: type[CachePolicy],
        *,
        group: int = 1,
        settings: dict[str, Any] | None = None,
        reader: Callable[[Pack, Tensor], RecordReader] = open_reader,
    ) -> None:
        """slots: records that fit; like: a layer of the model (its activation); policy and settings: who is evicted; group: keys that
        a token wants of a layer."""
        self.pack, self.slots, self.space, self.group = pack, slots, pack.space, group
        self.arena = Arena(slots, pack.layout, like)
        self.reader = reader(pack, self.arena.memory)
        self.places = SlotTable.new(len(self.space), slots)
        self.cache = pools(policy, pack.space, slots, settings or {}, group, self.places)
        self.times = Times()
        self.step = -1
        self.low: set[Key] = set()  # resident in int8 form
        self._flying: dict[Key, ReadJob] = {}  # prefetched and not looked at since
        self.price = 0.0  # seconds a record has cost so far that was waited for, spread over the threads; 0 = nothing is known

    def close(self) -> None:
        self.settle()
        self.reader.close()

    def slots_of(self, layer: int) -> np.ndarray:
        """Slot of each record of a layer that is resident or on its way, else -1: [E, N]."""
        keys = self.space.of_layer(layer)
        return self.places.of[keys.start : keys.stop].reshape(self.space.experts, self.space.parts)

    def resident(self, layer: int) -> np.ndarray:
        """Whether each record of a layer is resident or on its way, bool [E, N]."""
        return self.slots_of(layer) >= 0

    def moment(self, layer: int) -> Moment:
        return Moment(self.step * self.space.layers + layer, self.step, layer)

    def wanted(self, layer: int, index: Tensor, weight: Tensor, keep: Tensor) -> Wanted:
        """What a batch asks of a layer: index, weight [T, k], keep [T, k, N] bool."""
        return Wanted.of(index, weight, keep, self.space.experts, self.space.of_layer(layer).start)

    def run(
        self,
        layer: int,
        x: Tensor,
        wanted: Wanted,
        *,
        low: np.ndarray | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """out [T, d] (float32): sum over the wanted (token, sub-expert) pairs of weight x output, without down biases. x [T, d].

        low [E, N] bool: records to take in int8 form if they have to be read; meanwhile: called once while reads are under way.
        StoreError if a record cannot be read; the store can be used further then.
        """
        if layer == 0:
            self.step += 1
        self._reap()
        out = np.zeros(x.shape, np.float32)
        self._unwanted(layer, wanted)
        if len(wanted) + len(self._flying) <= self.capacity(layer):
            self._single(layer, x, wanted, low, out, self._beside(wanted, meanwhile))
        else:
            self.settle()
            few = len(wanted) < MANY * self.capacity(layer) and len(wanted.row) * x.shape[1] <= ENTRIES
            (self._rounds if few else self._pieces)(layer, x, wanted, low, out)
            if meanwhile is not None:
                meanwhile()
        return torch.from_numpy(out)

    def _beside(self, wanted: Wanted, meanwhile: Callable[[], None] | None) -> Callable[[], None] | None:
        """`meanwhile`, unable to push out what is about to be used. From a pool of its own no other layer pushes it out."""
        if meanwhile is None or isinstance(self.cache, LayerPools):
            return meanwhile

        def kept() -> None:
            keys = wanted.keys.tolist()
            self.cache.pin(keys)
            try:
                meanwhile()
            finally:
                self.cache.unpin(keys)

        return kept

    def prefetch(self, layer: int, keys: Sequence[Key]) -> None:
        """Begin to read keys of a layer that will run next, as far as there is room; never waited for unless they are asked for."""
        self._reap()
        now = self.moment(layer)
        self.cache.expect(layer, keys)
        pool = self._table(layer)
        if pool is not None:
            loads, victims, _ = pool.serve(np.array(keys, np.int64), now, True)
            found = self._loaded(loads, victims)
        else:
            found = self._placed(self.cache.prefetch(list(keys), now).loads)
        self.cache.pin(found.tolist())
        for job in self._read(layer, found, None, ahead=True):
            self._flying.update((item.key, job) for item in job.items)

    def settle(self) -> None:
        """Wait for everything that was begun ahead of its use."""
        for job in list(self._flying.values()):
            job.wait()
        self._reap()

    def _single(
        self, layer: int, x: Tensor, wanted: Wanted, low: np.ndarray | None, out: Floats, meanwhile: Callable[[], None] | None
    ) -> None:
        """Everything fits."""
        jobs, loads = self._fetch(layer, wanted, low)
        if jobs and len(wanted.row) * x.shape[1] <= ENTRIES:
            add_rows(self._parts(layer, x, wanted, jobs, loads, meanwhile), wanted.row, out)
            return
        if meanwhile is not None:
            meanwhile()
        self._wait(jobs, layer)
        self._compute(x, wanted, 0, len(wanted), out)

    def _rounds(self, layer: int, x: Tensor, wanted: Wanted, low: np.ndarray | None, out: Floats) -> None:
        """A little more than fits: what is there with as much of the rest as has room, then what is left."""
        parts = np.empty((len(wanted.row), x.shape[1]), np.float32)
        for group in self.cache.chunks(wanted.keys.tolist(), layer):
            own, entries = wanted.of_keys(np.isin(wanted.keys, group))
            parts[entries] = self._parts(layer, x, own, *self._fetch(layer, own, low))
        add_rows(parts, wanted.row, out)

    def _parts(
        self, layer: int, x: Tensor, wanted: Wanted, jobs: list[ReadJob], loads: Ints, meanwhile: Callable[[], None] | None = None
    ) -> Floats:
        """[S, d] of all entries: what is there is computed while the rest, which `jobs` bring, is read."""
        base = self.space.of_layer(layer).start
        missing = np.zeros(self.space.experts * self.space.parts, bool)
        missing[loads - base] = True
        late = missing[wanted.keys - base]
        slot = self._slot_of(wanted, 0, len(wanted))
        there = int((wanted.end - wanted.begin)[~late].sum()) * self.pack.layout.weights
        if there < TOGETHER:
            if meanwhile is not None:
                meanwhile()
            self._wait(jobs, layer)
            return self._outputs(x, wanted.row, wanted.weight, slot)
        parts = np.empty((len(slot), x.shape[1]), np.float32)
        ready, rest = wanted.entries(late)
        parts[ready] = self._outputs(x, wanted.row[ready], wanted.weight[ready], slot[ready])
        if meanwhile is not None:
            meanwhile()
        self._wait(jobs, layer)
        parts[rest] = self._outputs(x, wanted.row[rest], wanted.weight[rest], slot[rest])
        return parts

    def _pieces(self, layer: int, x: Tensor, wanted: Wanted, low: np.ndarray | None, out: Floats) -> None:
        """More than the cache holds: pieces in key order, the next few being read while one is computed.

        Residents that come later are pinned until their turn, as many as leave room for these pieces.
        """
        capacity = self.capacity(layer)
        most = 1 if self.pack.layout.bytes <= SMALL_RECORD else AHEAD
        kept = 1 if len(wanted) < MANY * capacity else 0
        size = max(1, capacity // ((1 + kept) * (most + 1)))
        ahead = min(most, capacity // size - 1)
        bounds = [(i, min(i + size, len(wanted))) for i in range(0, len(wanted), size)]
        keys = wanted.keys.tolist()
        later = [key for key in keys if key in self.cache][: capacity - (ahead + 1) * size]
        held = dict.fromkeys(later, 1)
        self.cache.pin(later)
        jobs: dict[int, list[ReadJob]] = {}

        def begin(number: int) -> None:
            first, last = bounds[number]
            jobs[number], _ = self._fetch(layer, wanted, low, first, last)
            self.cache.pin(keys[first:last])
            for key in keys[first:last]:
                held[key] = held.get(key, 0) + 1

        try:
            for number, (first, last) in enumerate(bounds):
                for following in range(number + len(jobs), min(number + ahead + 1, len(bounds))):
                    begin(following)
                self._wait(jobs.pop(number), layer)
                self._compute(x, wanted, first, last, out)
                for key in keys[first:last]:
                    self.cache.unpin([key] * held.pop(key))
        finally:
            for key, count in held.items():
                self.cache.unpin([key] * count)
            for rest in jobs.values():  # only after an error
                self._arrived(rest, layer)

    def _fetch(
        self, layer: int, wanted: Wanted, low: np.ndarray | None, first: int = 0, last: int | None = None
    ) -> tuple[list[ReadJob], Ints]:
        """Request keys first..last - 1, all of them by default: the reads to wait for, and the keys they bring."""
        last = len(wanted) if last is None else last
        pool = self._table(layer)
        if pool is not None:
            keys = wanted.keys[first:last]
            asked = keys[np.argsort(-wanted.importance[first:last], kind="stable")]
            loads, victims, bypassed = pool.serve(asked, self.moment(layer))
            found = self._loaded(loads, victims)
        else:
            names, weights = wanted.by_importance(first, last)
            access = self.cache.request(names, self.moment(layer), weights)
            found, bypassed = self._placed(access.loads), np.array(access.bypassed)
        if len(bypassed):
            raise RuntimeError(f"no room for {len(bypassed)} of {last - first} sub-experts")  # a piece was cut too large
        jobs = self._read(layer, found, low)
        if self._flying:
            wanted_now = wanted.keys[first:last].tolist()
            under_way = {id(job): job for key in wanted_now if (job := self._flying.get(key))}.values()
            jobs = [*jobs, *under_way]
            found = np.array([*found.tolist(), *(item.key for job in under_way for item in job.items)], np.int64)
        return jobs, found

    def _loaded(self, loads: Ints, victims: Ints) -> Ints:
        """Keys to load, ascending, of a table that has given them the slots of their victims."""
        if self.low:
            self.low.difference_update(victims.tolist())
        return np.sort(loads)

    def _placed(self, loads: Sequence[Load]) -> Ints:
        """The same for loads that have no slot yet."""
        for load in loads:
            self.low.difference_update(load.victims)
            self.places.place(load.key, load.victims)
        return np.array(sorted(load.key for load in loads), np.int64)

    def _vacate(self, key: Key) -> None:
        self.places.vacate(key)
        self.low.discard(key)

    def _read(self, layer: int, keys: Ints, low: np.ndarray | None, *, ahead: bool = False) -> list[ReadJob]:
        """Begin to read keys into their slots; low [E, N]: which of the layer's records in int8 form."""
        if not len(keys):
            return []
        layout = self.pack.layout
        lowered = None if low is None else low.reshape(-1)[keys - self.space.of_layer(layer).start]
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

    def _wait(self, jobs: Sequence[ReadJob], layer: int) -> None:
        """Wait for reads; what failed leaves the cache, and the first of it is raised."""
        began = time.perf_counter()
        failed = self._arrived(jobs, layer)
        waited = time.perf_counter() - began
        self.times.waited += waited
        records = sum(job.count for job in jobs)
        if records:
            self.price += PRICE * (waited / records - self.price) if self.price else waited / records
        if failed:
            key, reason = next(iter(failed.items()))
            raise StoreError(
                f"{self.pack.path}: {self.space.describe(key)} cannot be read: {reason}",
                "check the disk, or write the file again",
            )

    def _arrived(self, jobs: Sequence[ReadJob], layer: int) -> dict[Key, str]:
        """Wait for reads; what failed leaves the cache, and is returned with the reason."""
        failed: dict[Key, str] = {}
        for job in jobs:
            job.wait()
            failed |= job.failed
        for key in failed:
            if key in self._flying:
                self._land(key)
            if key in self.cache:
                self.cache.drop(key, self.moment(layer))
                self._vacate(key)
        return failed

    def _reap(self) -> None:
        """Take note of prefetches that have arrived."""
        if not self._flying:
            return
        self.reader.poll()
        for key, job in list(self._flying.items()):
            if job.done:
                self._land(key)
                if key in job.failed:
                    self._lose(key)

    def _land(self, key: Key) -> None:
        del self._flying[key]
        self.cache.unpin([key])

    def _lose(self, key: Key) -> None:
        self.cache.drop(key, self.moment(self.space.layer(key)))
        self._vacate(key)

    def _unwanted(self, layer: int, wanted: Wanted) -> None:
        """Take back the prefetches of this layer that nobody wants and no thread has begun."""
        if not self._flying:
            return
        needed = set(wanted.keys.tolist())
        jobs = {id(job): job for key, job in self._flying.items() if self.space.layer(key) == layer}
        for job in jobs.values():
            if not any(item.key in needed for item in job.items) and self.reader.cancel(job):
                for item in job.items:
                    self._land(item.key)
                    self._lose(item.key)

    def capacity(self, layer: int) -> int:
        """SlotTable of the pool a layer uses."""
        pool = self._pool(layer)
        assert isinstance(pool, (Pool, TablePool))
        return pool.capacity

    def _pool(self, layer: int) -> ExpertCache:
        return self.cache.pools[layer] if isinstance(self.cache, LayerPools) else self.cache

    def _table(self, layer: int) -> TablePool | None:
        pool = self._pool(layer)
        return pool if isinstance(pool, TablePool) else None

    def _slot_of(self, wanted: Wanted, first: int, last: int) -> Ints:
        """SlotTable [S] of the entries of keys first..last - 1."""
        slots: Ints = self.places.of[wanted.keys[first:last]]
        count = wanted.end[first:last] - wanted.begin[first:last]
        return slots if count.sum() == len(slots) else np.repeat(slots, count)

    def _compute(self, x: Tensor, wanted: Wanted, first: int, last: int, out: Floats) -> None:
        """Add the outputs of keys first..last - 1, all of them resident, in pieces of bounded size."""
        if first == last:
            return
        slot = self._slot_of(wanted, first, last)
        start, stop = int(wanted.begin[first]), int(wanted.end[last - 1])
        step = max(1, ENTRIES // x.shape[1])
        for first_entry in range(start, stop, step):
            last_entry = min(stop, first_entry + step)
            part = slice(first_entry, last_entry)
            own = slot[first_entry - start : last_entry - start]
            add_rows(self._outputs(x, wanted.row[part], wanted.weight[part], own), wanted.row[part], out)

    def _outputs(self, x: Tensor, row: Ints, weight: Floats, slot: Ints) -> Floats:
        """[S, d]: routing weight x output of entries, each the row of x it is about, its weight and its slot [S]."""
        began = time.perf_counter()
        found = self.arena.outputs(x, row, weight, slot)
        self.times.computed += time.perf_counter() - began
        return found
