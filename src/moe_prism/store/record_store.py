"""What every store is made of: a packed file, memory for some of its records, who leaves it, and the reads that fill it.

Shapes: E experts, N parts per expert.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from torch import Tensor

from ..offload.base import Key
from ..offload.cache.pool import LayerPools
from .aio_reader import open_reader
from .fast_pool import TablePool
from .fetch import Fetcher, Times
from .live_figures import StoreFigures
from .pack import Pack
from .pools import Eviction
from .reader import RecordReader
from .wanted import Ints

Open = Callable[[Pack, Tensor], RecordReader]
"""What reads records of a file into memory [slots, bytes]."""


class RecordStore:
    """Records of a packed file in memory, and who of them leaves for others."""

    def __init__(self, pack: Pack, memory: Tensor, mapped: mmap.mmap, eviction: Eviction, *, reader: Open = open_reader) -> None:
        """memory: uint8 [slots, bytes of a record] of what is mapped; eviction: who leaves; reader: what reads."""
        self.mapped = mapped
        self.pack, self.slots, self.space, self.group = pack, len(memory), pack.space, eviction.group
        self.times = Times()
        self.reader = reader(pack, memory)
        self.fetcher = Fetcher(pack, self.slots, eviction, self.reader, self.times)
        self.cache, self.places = self.fetcher.cache, self.fetcher.places
        self.in_use = self.slots
        self.reads_ahead = False  # somebody reads for the next layer
        self.on_step: Callable[[], None] | None = None
        self.on_end: Callable[[float], None] | None = None  # told of the seconds from a step's first layer to its last
        self._began = 0.0
        self._memory = memory

    def close(self) -> None:
        self.settle()
        self.reader.close()

    @property
    def price(self) -> float:
        """Seconds a record has cost so far that was waited for; 0 while nothing is known."""
        return self.fetcher.price

    def capacity(self, layer: int) -> int:
        """Slots of the pool that a layer uses."""
        return self.fetcher.capacity(layer)

    def slots_of(self, layer: int) -> np.ndarray:
        """Slot of each record of a layer that is resident or on its way, else -1: [E, N]."""
        keys = self.space.of_layer(layer)
        return self.places.of[keys.start : keys.stop].reshape(self.space.experts, self.space.parts)

    def resident(self, layer: int) -> np.ndarray:
        """Whether each record of a layer is resident or on its way, bool [E, N]."""
        return self.slots_of(layer) >= 0

    @property
    def uses(self) -> np.ndarray:
        """How often each record of the first layer was asked for [E, N]."""
        return self.fetcher.figures.first.reshape(self.space.experts, self.space.parts)

    def prefetch(self, layer: int, keys: Sequence[Key]) -> None:
        """Begin to read keys of a layer that will run next, as far as there is room; never waited for unless they are asked for."""
        self.fetcher.prefetch(layer, keys)

    def begin_step(self) -> None:
        """The first layer of a model begins."""
        self.fetcher.step += 1
        if self.on_step is not None:
            self.on_step()

    def begin_layer(self, layer: int, tokens: int) -> None:
        """A layer of a step of so many tokens begins."""
        if layer == 0:
            self.fetcher.figures.steps += 1
            self.fetcher.figures.tokens += tokens
            self._began = time.perf_counter()
            self.begin_step()
        self.fetcher.under_way.note_arrivals()

    def end_layer(self, layer: int) -> None:
        """A layer of a step has ended."""
        if layer == self.space.layers - 1 and self.on_end is not None:
            self.on_end(time.perf_counter() - self._began)

    def shrink(self, slots: int) -> int:
        """Give the memory of slots back until at most so many are in use, as far as every pool can still hold a layer's choice.

        Who leaves is who was used longest ago. Returns how many slots were given up: none of pools whose policy has no table.
        """
        self.settle()
        every = self.cache.pools if isinstance(self.cache, LayerPools) else [self.cache]
        tables = [pool for pool in every if isinstance(pool, TablePool)]
        if len(tables) < len(every) or slots >= self.in_use:
            return 0
        least = [min(pool.capacity, self.group) for pool in tables]
        share = max(0, slots - sum(least)) / max(1, self.in_use - sum(least))
        for pool, few in zip(tables, least, strict=True):
            for key in pool.shrink(few + int(share * (pool.capacity - few))):
                self.places.vacate(key)
        before, self.in_use = self.in_use, sum(pool.capacity for pool in tables)
        self.fetcher.figures.capacities = np.array(self.fetcher.capacities(), np.int64)
        self._release()
        return before - self.in_use

    def _release(self) -> None:
        """Hand the pages of free slots to the system; one that is used again gets new ones."""
        size = self._memory.shape[1]
        for slot in sorted(self.places.free[1 : 1 + self.places.free[0]].tolist()):
            with suppress(OSError, ValueError):  # a system that cannot: the memory stays
                self.mapped.madvise(mmap.MADV_REMOVE, slot * size, size)

    def figures(self) -> StoreFigures:
        """What it did so far. From any thread."""
        own, times = self.fetcher.figures, self.times
        counts = own.steps, own.tokens, own.requested, own.missed
        return StoreFigures(*counts, times.bytes, times.waited, *own.of_window())

    def forget_figures(self) -> None:
        """Count from nothing again."""
        self.fetcher.figures.reset()
        self.times.reset()

    def settle(self) -> None:
        """Wait for everything that was begun ahead of its use."""
        self.fetcher.under_way.wait()

    def beside(self, keys: Ints, meanwhile: Callable[[], None] | None) -> Callable[[], None] | None:
        """`meanwhile`, unable to push out what is about to be used. From a pool of its own no other layer pushes it out."""
        if meanwhile is None or isinstance(self.cache, LayerPools):
            return meanwhile

        def kept() -> None:
            own = keys.tolist()
            self.cache.pin(own)
            try:
                meanwhile()
            finally:
                self.cache.unpin(own)

        return kept
