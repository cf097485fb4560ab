"""The store: the sub-experts of a model on disk, as many of them as fit in an arena, and the computation of whatever a step asks for.

Shapes: T tokens, k experts per token, E experts, N parts per expert, d hidden. One thread runs a store; reading happens on others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..model import MoELayer
from .aio_reader import SMALL_RECORD, open_reader
from .arena import Arena
from .layout import RecordLayout
from .outputs import SlotOutputs
from .pack import Pack
from .pools import Eviction
from .reader import ReadJob
from .record_store import Open, RecordStore
from .wanted import Floats, Ints, Wanted, add_rows

OVERLAP_WORK = 1 << 14  # multiplications below which computing while reads are under way is not worth a call of its own
PIECES_AHEAD = 3  # pieces of a long prompt that are read while one is computed
PINNING_LIMIT = 4  # a batch that wants more than so many times what fits keeps no residents for its later pieces


class LayerBatch(NamedTuple):
    """What one call of `run` is about: x [T, d], what it wants, and which records [E, N] may come in int8 form."""

    layer: int
    x: Tensor
    wanted: Wanted
    low: np.ndarray | None


class ExpertStore(RecordStore):
    """`run` gives what an in-memory executor would, from records that are read when they are missing.

    The result does not depend on what was resident: every sub-expert's output is computed alone and they are added in key order.
    compiled: few tokens may go by the compiled calls of `one_call.py` instead.
    """

    def __init__(self, pack: Pack, slots: int, like: MoELayer, eviction: Eviction, *, reader: Open = open_reader) -> None:
        """slots: records that fit; like: a layer of the model (its activation); eviction: who leaves; reader: what reads."""
        assert isinstance(pack.layout, RecordLayout)
        self.arena = Arena(slots, pack.layout, like)
        super().__init__(pack, self.arena.memory, self.arena.mapped, eviction, reader=reader)
        self._outputs = SlotOutputs(self.arena, self.places, self.times)
        self.compiled = True

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
        self.begin_layer(layer, len(x))
        out = self.run_begun(LayerBatch(layer, x, wanted, low), meanwhile)
        self.end_layer(layer)
        return out

    def run_begun(self, batch: LayerBatch, meanwhile: Callable[[], None] | None) -> Tensor:
        """`run` of a layer that has begun."""
        layer, x, wanted, _ = batch
        under_way = self.fetcher.under_way
        out = np.zeros(x.shape, np.float32)
        if under_way:
            under_way.take_back(self.space.of_layer(layer), set(wanted.keys.tolist()))
        capacity = self.capacity(layer)
        if len(wanted) + len(under_way) <= capacity:
            self._at_once(batch, out, self.beside(wanted.keys, meanwhile))
        else:
            self.settle()  # its pins would take room from the pieces
            if len(wanted) < PINNING_LIMIT * capacity and self._outputs.can_hold(x, wanted):
                self._in_rounds(batch, out)
            else:
                self._in_pieces(batch, out)
            if meanwhile is not None:
                meanwhile()
        return torch.from_numpy(out)

    def _at_once(self, batch: LayerBatch, out: Floats, meanwhile: Callable[[], None] | None) -> None:
        """Everything fits."""
        x, wanted = batch.x, batch.wanted
        jobs, loads = self.fetcher.request(batch.layer, wanted, batch.low)
        if jobs and self._outputs.can_hold(x, wanted):
            add_rows(self._parts(batch, jobs, loads, meanwhile), wanted.row, out)
            return
        if meanwhile is not None:
            meanwhile()
        self.fetcher.wait(jobs)
        self._outputs.add(x, wanted, 0, len(wanted), out)

    def _in_rounds(self, batch: LayerBatch, out: Floats) -> None:
        """A little more than fits: residents go first, together with as many of the others as there is room for.

        In key order a resident of a late key could be pushed out before its turn and would have to be read again. The outputs of all
        rounds are held and added in key order at the end, so the sums are those of a batch that fits.
        """
        x, wanted = batch.x, batch.wanted
        parts = np.empty((len(wanted.row), x.shape[1]), np.float32)
        for group in self.cache.chunks(wanted.keys.tolist(), batch.layer):
            own, entries = wanted.of_keys(np.isin(wanted.keys, group))
            round_ = batch._replace(wanted=own)
            parts[entries] = self._parts(round_, *self.fetcher.request(batch.layer, own, batch.low))
        add_rows(parts, wanted.row, out)

    def _parts(self, batch: LayerBatch, jobs: list[ReadJob], loads: Ints, meanwhile: Callable[[], None] | None = None) -> Floats:
        """[S, d] of all entries: what is there is computed while the rest, which `jobs` bring, is read."""
        x, wanted = batch.x, batch.wanted
        base = self.space.of_layer(batch.layer).start
        missing = np.zeros(self.space.experts * self.space.parts, bool)
        missing[loads - base] = True
        late = missing[wanted.keys - base]
        slot = self._outputs.slots(wanted, 0, len(wanted))
        there = int((wanted.end - wanted.begin)[~late].sum()) * self.pack.layout.weights
        if there < OVERLAP_WORK:
            if meanwhile is not None:
                meanwhile()
            self.fetcher.wait(jobs)
            return self._outputs.compute(x, wanted.row, wanted.weight, slot)
        parts = np.empty((len(slot), x.shape[1]), np.float32)
        ready, rest = wanted.entries(late)
        parts[ready] = self._outputs.compute(x, wanted.row[ready], wanted.weight[ready], slot[ready])
        if meanwhile is not None:
            meanwhile()
        self.fetcher.wait(jobs)
        parts[rest] = self._outputs.compute(x, wanted.row[rest], wanted.weight[rest], slot[rest])
        return parts

    def _in_pieces(self, batch: LayerBatch, out: Floats) -> None:
        """More than the cache holds: pieces in key order, the next few being read while one is computed.

        Residents that come later are pinned until their turn, as many as leave room for these pieces.
        """
        layer, wanted, fetcher = batch.layer, batch.wanted, self.fetcher
        pool, capacity = fetcher.pool(layer), self.capacity(layer)
        # The capacity is shared by the piece that is computed, those that are read meanwhile, and residents of later pieces. Small
        # records make short pieces, of which one is enough to keep the disk busy. Where the batch wants far more than fits, residents
        # save few of its reads, and their room is worth more as larger pieces.
        most = 1 if self.pack.layout.bytes <= SMALL_RECORD else PIECES_AHEAD
        kept = 1 if len(wanted) < PINNING_LIMIT * capacity else 0
        size = max(1, capacity // ((1 + kept) * (most + 1)))
        ahead = min(most, capacity // size - 1)
        bounds = [(i, min(i + size, len(wanted))) for i in range(0, len(wanted), size)]
        keys = wanted.keys.tolist()
        later = wanted.keys[self.places.of[wanted.keys] >= 0][: capacity - (ahead + 1) * size].tolist()
        # How often we pinned each key: once as a resident of a later piece, once when its piece begins. Pins count, and must be given
        # back as often, also after an error.
        held = dict.fromkeys(later, 1)
        pool.pin(later)
        jobs: dict[int, list[ReadJob]] = {}

        def begin(number: int) -> None:
            first, last = bounds[number]
            jobs[number], _ = fetcher.request(layer, wanted, batch.low, first, last)
            pool.pin(keys[first:last])
            for key in keys[first:last]:
                held[key] = held.get(key, 0) + 1

        try:
            for number, (first, last) in enumerate(bounds):
                for following in range(number + len(jobs), min(number + ahead + 1, len(bounds))):
                    begin(following)
                fetcher.wait(jobs.pop(number))
                self._outputs.add(batch.x, wanted, first, last, out)
                pool.unpin([key for key in keys[first:last] for _ in range(held.pop(key))])
        finally:
            pool.unpin([key for key, count in held.items() for _ in range(count)])
            for rest in jobs.values():  # only after an error: nobody may write to these slots once they are given to others
                fetcher.settle(rest)
