"""A layer's step from the store by compiled calls (`compiled_step.py`): one where everything is there, three where something is read.

It gives what selection, `ExpertStore.run` and compensation give one after the other: the same outputs to the last bit, the same cache.
Where something is not of the compiled kind, the parts are called.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..elastic.base import FEW, LayerParts
from ..elastic.compensate import Compensator
from ..elastic.execute import batch_products
from ..elastic.execute.decode_products import ENOUGH, ORDER, like_of, table_of
from ..elastic.execute.one_call import CALLS, ChoiceRecord, choice_key, filled, is_compiled_choice
from ..kernels import block_jobs
from ..kernels.whole_layer import WEIGHTS
from .arena import UNGROUPED_WORK, UNSHARED_WORK
from .compiled_step import DONE, REFUSED, TOO_MANY, ArenaTables, Cache, StepLayer, StepRows, begin_step, compute, finish
from .fast_pool import TablePool
from .fetch import no_room
from .store import ExpertStore, LayerBatch
from .wanted import Wanted

if TYPE_CHECKING:
    from ..elastic.control import Past
    from ..elastic.select import Selection


class CompiledLayer:
    """What compiled calls read of a layer and of the store's arena, as long as it lies there."""

    def __init__(self, parts: LayerParts, store: ExpertStore) -> None:
        """Of a layer that `takes_layer`."""
        self.parts, self.store, self.number = parts, store, parts.layer.index
        self.calls: dict[Any, StoredCall] = {}
        space, layout, number = store.space, store.pack.layout, self.number
        pool = store.fetcher.pool(number)
        assert isinstance(pool, TablePool)
        own = store.arena.parts
        stored = batch_products.Stored.of(own)
        tables = table_of(stored.first), table_of([batch_products.MatrixPart(stored.down, 0)])
        self.arena = ArenaTables(*tables, store.slots, ORDER, store.places, like_of(stored.down.tensor.dtype))
        self.layer = StepLayer(
            number, space.of_layer(number).start, space.experts, space.parts, layout.hidden, layout.block, pool.capacity
        )
        self.pool, self.per_choice = pool, space.parts * layout.weights
        self._cache = Cache(pool.residency, pool.order, store.fetcher.under_way.pending)
        self._weights: Any = None

    def cache(self) -> Cache:
        """The pool's tables, which change when it shrinks."""
        if self._cache.residency is not self.pool.residency:
            self._cache = self._cache._replace(residency=self.pool.residency)
            self.layer = self.layer._replace(capacity=self.pool.capacity)
        return self._cache

    def takes(self, x: Tensor, index: Tensor, weight: Tensor) -> bool:
        """Whether these are few rows that can be read where they are."""
        count, one = index.numel(), torch.get_num_threads() == 1
        return (
            self.store.compiled
            and 0 < count <= FEW
            and count * self.layer.parts <= ENOUGH
            and count * self.per_choice <= (UNGROUPED_WORK if one else UNSHARED_WORK)
            and x.dtype is torch.float32
            and weight.dtype is torch.float32
            and index.dtype is torch.int64
            and x.is_contiguous()
            and index.is_contiguous()
            and weight.is_contiguous()
            and not torch.is_grad_enabled()
        )

    def weights(self, stored: batch_products.Stored) -> int:
        """Address of the WEIGHTS of the gate neurons, which lie in memory."""
        if self._weights is None or self._weights[1] is not stored:
            layer, parts = self.layer, self.parts
            record = {"hidden": layer.hidden, "experts": layer.experts, "n_sub": layer.parts, "block": parts.block}
            self._weights = filled(WEIGHTS, {**record, "dot_job": block_jobs.dot_job.address}), stored
        return self._weights[0].ctypes.data  # type: ignore[no-any-return]

    def choice(self, selection: Selection, extra: Compensator | None, ahead: Callable[..., None]) -> StoredCall | None:
        """What chooses as a selection does; None where that is not compiled, or the store has other parts than the layer."""
        key = choice_key(selection, extra)
        found = self.calls.get(key)
        if found is None:
            stored = batch_products.usable(self.parts, selection.x)
            if stored is None or not is_compiled_choice(selection, extra) or self.parts.n_sub != self.layer.parts:
                return None
            if stored.down.tensor.dtype != torch.float32:
                return None
            if len(self.calls) == CALLS:
                self.calls.clear()
            scorer: Any = selection.scorer
            table = np.array([part.cells(0) for part in scorer.gate_parts(stored)], np.int64)
            record = ChoiceRecord(self.weights(stored), self.parts.gates, table, selection, extra)
            found = self.calls[key] = StoredCall(self, record, extra, ahead)
        return found


def takes_layer(parts: LayerParts, store: ExpertStore) -> bool:
    """Whether a layer's step can be compiled calls: the arena and the policy are of that kind."""
    own, layer = store.arena.parts, parts.layer
    stored = batch_products.Stored.of(own)
    return (
        isinstance(store.fetcher.pool(layer.index), TablePool)
        and stored.ready
        and own.layer.gate is not None
        and own.layer.is_silu
        and own.layer.up_bias is None
        and layer.down_bias is None
        and layer.up_bias is None
    )


class StoredCall:
    """A layer's slots chosen in one way, read and computed. record None: all slots are kept. ahead: begins to read for the next layer."""

    def __init__(
        self, layer: CompiledLayer, record: ChoiceRecord | None, extra: Compensator | None, ahead: Callable[..., None]
    ) -> None:
        self.layer, self.record, self.extra, self.ahead = layer, record, extra, ahead
        self.choice = 0 if record is None else record.address

    def dials(self, selection: Selection) -> int | None:
        """Address of the budgets that a selection asks for; None for what is no budget per token."""
        assert self.record is not None
        return self.record.budget(selection.budget, len(selection.x), FEW)

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor, dials: int = 0, past: int = 0) -> tuple[Tensor, Tensor]:
        """(out [T, d], keep [T, k, N]). dials, past: addresses of budgets [T] and of a PAST.

        StoreError if a record cannot be read; the store can be used further then.
        """
        own, store = self.layer, self.layer.store
        began = time.perf_counter()
        store.begin_layer(own.number, len(x))
        under_way, times, cache = store.fetcher.under_way, store.times, own.cache()
        ahead = partial(self.ahead, own.number + 1, x, index) if store.reads_ahead else None
        tokens, k = index.shape
        out, keep = torch.empty_like(x), torch.empty((tokens, k, own.layer.parts), dtype=torch.bool)
        rows = StepRows(
            x.data_ptr(), index.data_ptr(), weight.data_ptr(), tokens, k, self.choice, past, dials,
            keep.data_ptr(), out.data_ptr(), store.fetcher.step, len(under_way), ahead is not None,
        )  # fmt: skip
        state, entries, loads, importance = begin_step(own.layer, cache, rows, own.arena)
        if state == DONE:
            store.fetcher.figures.note(own.number, entries.keys, 0)
            times.computed += time.perf_counter() - began
            store.end_layer(own.number)
            return out, keep
        if state == TOO_MANY:
            wanted = Wanted(entries.keys, entries.begin, entries.end, entries.row, entries.weight, importance)
            found = store.run_begun(LayerBatch(own.number, x, wanted, None), ahead)
            store.end_layer(own.number)
            fix = self.extra
            return found if fix is None else found + fix(x, index, weight, keep), keep
        if state == REFUSED:
            raise no_room(len(entries.keys))
        jobs = store.fetcher.read_placed(own.number, loads, entries.keys)
        parts = np.empty((len(entries.row), x.shape[1]), np.float32)
        meanwhile = store.beside(entries.keys, ahead)
        if meanwhile is not None and not jobs:
            meanwhile()
            meanwhile = None
        compute(own.layer, own.arena, rows, entries, False, parts)
        times.computed += time.perf_counter() - began
        if meanwhile is not None:
            meanwhile()
        store.fetcher.wait(jobs)
        began = time.perf_counter()
        finish(own.layer, own.arena, rows, entries, parts)
        times.computed += time.perf_counter() - began
        store.end_layer(own.number)
        return out, keep


@dataclass(slots=True, eq=False)
class StoredAgain:
    """A step for tokens that are all at one operating point, as `execute.base.Again`. holds: whether its budget is held."""

    call: StoredCall
    dials: int
    holds: bool

    def __call__(self, x: Tensor, weight: Tensor, index: Tensor, past: Past | None) -> Tensor | None:
        """The layer's output [T, d]; None where the parts have to be called."""
        if not self.call.layer.takes(x, index, weight):
            return None
        at = 0
        if self.holds:
            if past is None or past.rows.shape[1] != len(x):
                return None
            at = past.address
        return self.call(x, index, weight, self.dials, at)[0]
