"""A store of planes: the records of a step are planes of the slots that it keeps, as many as each slot's width asks for.

Planes are keys of their own. So a slot that gains in width is a hit for its upper plane and a read of the lower one. Whoever decides
what leaves decides for each plane. Shapes: T tokens, k experts per token, E experts, N sub-experts per expert, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..model import MoELayer
from .aio_reader import open_reader
from .outputs import PARTIAL_NUMBERS
from .pack import Pack
from .plane_arena import PlaneArena
from .plane_layout import PlaneLayout
from .plane_wanted import PlaneWanted
from .pools import Eviction
from .reader import ReadJob
from .record_store import Open, RecordStore
from .wanted import Ints, Wanted, add_rows


class PlaneStore(RecordStore):
    """A layer has 2 N keys per expert: of every sub-expert the upper plane, then the lower one."""

    def __init__(self, pack: Pack, slots: int, like: MoELayer, eviction: Eviction, *, reader: Open = open_reader) -> None:
        """As of `ExpertStore`; the file holds planes."""
        assert isinstance(pack.layout, PlaneLayout)
        self.arena = PlaneArena(slots, pack.layout, like)
        super().__init__(pack, self.arena.memory, self.arena.mapped, eviction, reader=reader)
        self.heard: Callable[[int, int, Wanted, int], None] | None = None
        """Told of every request: layer, tokens, records, and the slots of a run with its first one, 0 with others."""

    def places_of(self, layer: int) -> Ints:
        """[E N, 2]: the place of both planes of every block of a layer, negative where they are not there or on their way."""
        return self.slots_of(layer).reshape(-1, 2)

    def run(self, layer: int, x: Tensor, wanted: PlaneWanted, *, meanwhile: Callable[[], None] | None = None) -> Tensor:
        """out [T, d] (float32): sum over slots of weight x output, each at its width, without output biases. x [T, d].

        meanwhile: called once while reads are under way. StoreError if a record cannot be read; the store can be used further then. The
        result does not depend on what was resident.
        """
        self.begin_layer(layer, len(x))
        under_way, base = self.fetcher.under_way, self.space.of_layer(layer).start
        if under_way:
            under_way.take_back(self.space.of_layer(layer), set((base + wanted.record).tolist()))
        out = np.zeros(x.shape, np.float32)
        few = self.arena.is_few(wanted) and len(wanted.row) * x.shape[1] <= PARTIAL_NUMBERS
        if few and len(wanted.record) + len(under_way) <= self.capacity(layer):
            if meanwhile is not None:
                meanwhile = self.beside(base + wanted.record, meanwhile)
            self._in_one(layer, x, wanted, out, meanwhile)
            self.end_layer(layer)
            return torch.from_numpy(out)
        self.settle()  # its pins would take room from the pieces
        whole = torch.from_numpy(out)
        self._piece_by_piece(layer, x, wanted, whole)
        if meanwhile is not None:
            meanwhile()
        self.end_layer(layer)
        return whole

    def _in_one(self, layer: int, x: Tensor, wanted: PlaneWanted, out: np.ndarray, meanwhile: Callable[[], None] | None) -> None:
        """Everything fits: slots whose planes are there are computed while the others' are read."""
        base = self.space.of_layer(layer).start
        records = wanted.records(base)
        if self.heard is not None:
            self.heard(layer, len(x), records, len(wanted.row))
        jobs, loads = self.fetcher.request(layer, records, None)
        late = wanted.late(loads - base)
        places, parts = self.places_of(layer), np.empty((len(wanted.row), x.shape[1]), np.float32)
        self.arena.outputs(x, wanted, np.flatnonzero(~late), places, parts)
        if meanwhile is not None:
            meanwhile()
        self.fetcher.wait(jobs)
        self.arena.outputs(x, wanted, np.flatnonzero(late), places, parts)
        add_rows(parts, wanted.row, out)

    def _piece_by_piece(self, layer: int, x: Tensor, wanted: PlaneWanted, out: Tensor) -> None:
        """More than fits, or than one thread should compute: in order, the next piece being read while one is computed.

        The pieces follow from what is asked and what fits alone, so sums do not depend on what was resident.
        """
        base, capacity = self.space.of_layer(layer).start, self.capacity(layer)
        pieces = list(wanted.pieces(capacity // 2 if capacity >= 4 else capacity))
        jobs: dict[int, list[ReadJob]] = {}
        held: dict[int, list[int]] = {}

        def begin(number: int) -> None:
            records = wanted.records(base, *pieces[number])
            if self.heard is not None:
                self.heard(layer, len(x), records, 0 if number else len(wanted.row))
            jobs[number], _ = self.fetcher.request(layer, records, None)
            held[number] = records.keys.tolist()
            self.cache.pin(held[number])

        try:
            for number, piece in enumerate(pieces):
                if number not in jobs:
                    begin(number)
                if capacity >= 4 and number + 1 < len(pieces):
                    begin(number + 1)
                self.fetcher.wait(jobs.pop(number))
                self.arena.add(x, wanted, piece, self.places_of(layer), out)
                self.cache.unpin(held.pop(number))
        finally:
            for keys in held.values():
                self.cache.unpin(keys)
            for rest in jobs.values():  # only after an error: nobody may write to these places once they are given to others
                self.fetcher.settle(rest)
