"""Fast memory in front of host memory in front of a disk: the same reader, arena and cache, once more.

To a store, its arena is the fast memory, and a `TierReader` is what fills it: with records that lie in host memory, which a second cache
keeps there and a reader of the disk brings. A record that is missing in fast memory may be computed where it lies instead, by the
processor, where that takes less time than the copy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..model import MoELayer
from ..offload.base import Key
from ..offload.cache import cache_policies
from .aio_reader import open_reader
from .arena import Arena
from .device import Device, Transfer
from .fetch import Fetcher, Times
from .layout import RecordLayout
from .outputs import SlotOutputs
from .pack import Pack
from .pools import Eviction
from .reader import Item, RecordReader
from .record_store import Open
from .store import ExpertStore, LayerBatch
from .wanted import Flags, Floats, Ints, Wanted, add_rows

NONE: Ints = np.empty(0, np.int64)
NO_WEIGHTS: Floats = np.empty(0, np.float32)
TRIES = 5


@dataclass(frozen=True)
class Tier:
    """Host memory behind fast memory: records that fit there, and what copies them. policy: who leaves host memory.

    computes: whether the processor may compute what is missing in fast memory.
    """

    slots: int
    device: Device
    policy: str = "lru"
    computes: bool = True

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UsageError(f"host memory of {self.slots} records holds none", "give at least one")


class HostRecords:
    """Records in host memory: a cache of them, and what computes with them there."""

    def __init__(self, pack: Pack, tier: Tier, like: MoELayer, reader: Open) -> None:
        assert isinstance(pack.layout, RecordLayout)
        self.arena = Arena(min(tier.slots, len(pack.space)), pack.layout, like)
        self.times = Times()
        slots = self.arena.memory.shape[0]
        eviction = Eviction(cache_policies.get(tier.policy), group=2 * slots + 2)  # one pool for all layers
        self.fetcher = Fetcher(pack, slots, eviction, reader(pack, self.arena.memory), self.times)
        self.outputs = SlotOutputs(self.arena, self.fetcher.places, self.times)
        self.capacity = slots

    def request(self, layer: int, keys: Ints) -> list[Any]:
        """Reads to wait for before these keys, ascending, are all there. They fit beside what is pinned."""
        self.fetcher.step += 1
        weights = np.ones(len(keys), np.float32)
        return self.fetcher.request(layer, Wanted(keys, NONE, NONE, NONE, NO_WEIGHTS, weights), None)[0]

    def record(self, key: Key) -> Tensor:
        """The bytes of a record that is there."""
        return self.arena.memory[self.fetcher.places.of[key]]


@dataclass
class TierJob:
    """As `reader.ReadJob`: first records come into host memory, then they are copied."""

    items: list[Item]
    reader: TierReader
    reads: list[Any]
    transfers: list[Transfer] | None = None  # None: they have not come into host memory yet
    failed: dict[int, str] = field(default_factory=dict)
    over: bool = False

    @property
    def count(self) -> int:
        return len(self.items)

    @property
    def done(self) -> bool:
        """As far as it can tell without waiting."""
        if not self.over:
            self.reader.advance(self, waits=False)
        return self.over

    def wait(self) -> None:
        while not self.over:
            self.reader.advance(self, waits=True)


class TierReader(RecordReader):
    """Reads records of host memory into fast memory."""

    def __init__(self, host: HostRecords, device: Device, memory: Tensor) -> None:
        self.host, self.device, self.pack = host, device, host.fetcher.pack
        self._memory = memory
        self._jobs: list[TierJob] = []

    def read(self, keys: Ints, slots: Ints, *, low: bool = False, ahead: bool = False) -> Sequence[TierJob]:  # type: ignore[override]
        """As `RecordReader.read`; keys are of one layer. More than host memory holds comes in turns, and is waited for."""
        if low:
            raise UsageError("host memory holds no int8 forms", "leave --int8-budget out")
        most = 1 if ahead else self.host.capacity
        return [self._begin(keys[at : at + most], slots[at : at + most]) for at in range(0, len(keys), most)]

    def _begin(self, keys: Ints, slots: Ints) -> TierJob:
        while self.pinned + len(keys) > self.host.capacity:
            self._jobs[0].wait()
        names = keys.tolist()
        job = TierJob([Item(k, s) for k, s in zip(names, slots.tolist(), strict=True)], self, [])
        job.reads = self.host.request(self.pack.space.layer(names[0]), keys)
        self.host.fetcher.cache.pin(names)
        self._jobs.append(job)
        return job

    @property
    def pinned(self) -> int:
        """Records of host memory that are being copied."""
        return sum(job.count for job in self._jobs)

    def advance(self, job: TierJob, *, waits: bool) -> None:
        """Take a job on to its next stage: from the disk, to fast memory, done."""
        if job.transfers is None:
            if not waits:
                self.host.fetcher.reader.poll()
                if not all(read.done for read in job.reads):
                    return
            lost = self.host.fetcher.settle(job.reads)
            job.failed = {item.key: lost[item.key] for item in job.items if item.key in lost}
            there = [item for item in job.items if item.key not in job.failed]
            job.transfers = [self.device.copy(self.host.record(i.key), self._memory[i.slot]) for i in there]
        if waits:
            for transfer in job.transfers:
                transfer.wait()
        if all([transfer.done for transfer in job.transfers]):  # noqa: C419 - each takes note of its end
            job.over = True
            self._jobs.remove(job)
            self.host.fetcher.cache.unpin([item.key for item in job.items])

    def poll(self) -> None:
        for job in list(self._jobs):
            self.advance(job, waits=False)

    def cancel(self, job: TierJob) -> bool:  # type: ignore[override]
        """What has begun goes on."""
        return False

    def close(self) -> None:
        for job in list(self._jobs):
            job.wait()
        self.host.fetcher.reader.close()


class TieredStore(ExpertStore):
    """`ExpertStore` whose arena is fast memory. The result is the same, wherever a record was and whoever computed it."""

    def __init__(
        self, pack: Pack, slots: int, like: MoELayer, eviction: Eviction, *, tier: Tier, reader: Open = open_reader
    ) -> None:
        self.tier, self.host = tier, HostRecords(pack, tier, like, reader)
        super().__init__(pack, slots, like, eviction, reader=lambda _, memory: TierReader(self.host, tier.device, memory))
        self.compiled = False
        self.on_host = 0  # records that the processor computed where they lay
        self.copy_seconds = tier.device.seconds(self.host.arena.memory[0], self.arena.memory[0])
        self.row_seconds = self._measured()

    def _measured(self) -> float:
        """What the processor takes for a row and a record in host memory, the shortest of some."""
        x, found = torch.zeros(1, self.pack.layout.hidden), []
        one = np.zeros(1, np.int64)
        for _ in range(TRIES):
            began = time.perf_counter()
            self.host.arena.outputs(x, one, np.ones(1, np.float32), one)
            found.append(time.perf_counter() - began)
        return min(found)

    def run_begun(self, batch: LayerBatch, meanwhile: Any) -> Tensor:
        far = self._for_host(batch)
        if far is None:
            return super().run_begun(batch, meanwhile)
        layer, x, wanted, _ = batch
        own, entries = wanted.of_keys(far)
        rest, others = wanted.of_keys(~far)
        names = own.keys.tolist()
        reads = self.host.request(layer, own.keys)
        self.host.fetcher.cache.pin(names)
        try:
            parts = np.empty((len(wanted.row), x.shape[1]), np.float32)
            if len(rest):
                jobs, loads = self.fetcher.request(layer, rest, None)
                parts[others] = self._parts(batch._replace(wanted=rest), jobs, loads)
            self.host.fetcher.wait(reads)
            slot = self.host.outputs.slots(own, 0, len(own))
            parts[entries] = self.host.outputs.compute(x, own.row, own.weight, slot)
        finally:
            self.host.fetcher.settle(reads)
            self.host.fetcher.cache.unpin(names)
        self.on_host += len(own)
        if meanwhile is not None:  # not before: what it reads must find room in host memory
            meanwhile()
        out = np.zeros(x.shape, np.float32)
        add_rows(parts, wanted.row, out)
        return torch.from_numpy(out)

    def _for_host(self, batch: LayerBatch) -> Flags | None:
        """Keys [G] that the processor computes where they lie; None for none of them.

        While fast memory has room, what is missing is copied: it may be wanted again.
        """
        wanted, cache = batch.wanted, self.fetcher.pool(batch.layer)
        fits = len(wanted) + len(self.fetcher.under_way) <= self.capacity(batch.layer) and self._outputs.can_hold(batch.x, wanted)
        if not (self.tier.computes and fits and len(cache) >= self.capacity(batch.layer)):
            return None
        cheap = (wanted.end - wanted.begin) * self.row_seconds < self.copy_seconds
        far: Flags = cheap & (self.places.of[wanted.keys] < 0)
        assert isinstance(self.reader, TierReader)
        return far if far.any() and len(far) + self.reader.pinned <= self.host.capacity else None
