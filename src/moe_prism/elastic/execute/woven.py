"""The executor of a batch whose tokens may have different adapters: the layer's experts and the tuned ones behind them, in one call."""

from __future__ import annotations

from torch import Tensor

from ...adapters.room import RoomyLayer
from ...adapters.table import AdapterTable
from ..base import LayerParts
from . import triton_run
from .base import Settled
from .plain import grouped, whole_experts

MOSTLY = 0.75  # kept share from which on one product of whole experts takes less time than N of blocks


class Woven:
    """What one layer computes with. layer: with room; table: where each adapter's experts are in it.

    It never takes the model's own function, which knows the base's experts alone. So rows come out the same whatever adapters the others
    of their batch have, where the compiled tiles compute them.
    """

    def __init__(self, parts: LayerParts, layer: RoomyLayer, table: AdapterTable) -> None:
        self.layer, self.table = layer, table
        self.parts = LayerParts(layer, parts.n_sub, parts.gates)

    def run(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled, adapter: int | Tensor) -> Tensor:
        """[T, d], as `Executor.run`; index [T, k]: ids of the base model."""
        slots = self.table.slots(index, adapter)
        keep = settled.keep
        if x.is_cuda:
            return triton_run.deterministic(self.parts, x, slots, weight, keep)
        from .tiled import tiled  # compiles on first use

        out: Tensor | None = tiled(self.parts, x, slots, weight, keep)
        if out is None:
            way = grouped if keep.float().mean() < MOSTLY else whole_experts
            out = way(self.parts, x, slots, weight, keep)
        return out

    def forget(self) -> None:
        """Nothing that was prepared from the weights holds any more."""
        self.parts.stored = self.parts.few = self.parts.whole = self.parts.ready = None
