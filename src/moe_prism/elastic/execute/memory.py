"""The executor of a model in memory: one of several ways to compute, repaired where the artefact is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...errors import UsageError
from ...model.base import is_expert
from ..base import LayerParts
from ..repair import Repaired
from ..side_tensors import REPAIR
from . import triton_run
from .base import Executor, Settled
from .plain import grouped, reference, whole_experts

Way = Callable[..., Tensor]
MOSTLY = 0.75  # kept share from which on one product of whole experts takes less time than N of blocks


@dataclass
class Tally:
    """Calls of a layer that dropped slots, and those of them in which whole experts were computed all the same."""

    calls: int = 0
    whole: int = 0


def auto(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor, tally: Tally | None = None) -> Tensor:
    """The fastest way that fits the layer. Shapes as in `plain.reference`."""
    if x.is_cuda:
        return triton_run.deterministic(parts, x, index, weight, keep)
    from .batch_products import usable  # compiles on first use
    from .tiled import tiled

    tally = tally or Tally()
    tally.calls += 1
    if usable(parts, x) is None:
        return _vectorised(parts, x, index, weight, keep, tally)
    if _whole_is_faster(parts, x, index, keep):
        tally.whole += 1
        return whole_experts(parts, x, index, weight, keep)
    out = tiled(parts, x, index, weight, keep)
    return _vectorised(parts, x, index, weight, keep, tally) if out is None else out


def _whole_is_faster(parts: LayerParts, x: Tensor, index: Tensor, keep: Tensor) -> bool:
    """Whether the model's own function takes less time for all slots than the tiles for those that are kept."""
    from .times import forced, times_of

    if forced() != "measure":
        return False
    times = times_of(parts, len(x), index.shape[1])
    return times.stock < times.half or (times.stock < times.tiles and times.stock < times.kept(float(keep.float().mean())))


def _vectorised(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor, tally: Tally) -> Tensor:
    """Where no tile can be used: N products of blocks, or one of whole experts where that multiplies fewer, larger matrices."""
    if keep.float().mean() < MOSTLY:
        return grouped(parts, x, index, weight, keep)
    tally.whole += 1
    return whole_experts(parts, x, index, weight, keep)


WAYS: Mapping[str, Way] = {
    "auto": auto,
    "grouped": grouped,
    "reference": reference,
    "triton": triton_run.deterministic,
    "triton-atomic": triton_run.atomic,
}


class InMemory(Executor):
    """The weights are the model's own. way: a name of WAYS."""

    def __init__(self, parts: LayerParts) -> None:
        self.parts = parts
        self.way = "auto"
        self.tally = Tally()
        self.repaired = Repaired(parts) if REPAIR in parts.tensors else None

    def whole(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """By the tiles where they are faster (`times.py`), else by the model's own function."""
        out = self._whole_by_tiles(x, index, weight) if x.is_cpu and x.dtype == torch.float32 and self.way == "auto" else None
        return self.parts.layer.native(x, index, weight) if out is None else out

    def _whole_by_tiles(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor | None:
        from .batch_products import usable  # compiles on first use
        from .tiled import tiled
        from .times import forced, times_of, whole_parts

        choice = forced()
        if choice == "stock" or not len(x) or usable(self.parts, x) is None:
            return None
        if choice == "measure" and not times_of(self.parts, len(x), index.shape[1]).tiles_win:
            return None
        chosen = is_expert(index, self.parts.layer.num_experts).unsqueeze(2)
        return tiled(whole_parts(self.parts), x, index, weight, chosen)

    def run(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        execute = partial(auto, tally=self.tally) if self.way == "auto" else WAYS[self.way]
        if self.repaired is None:
            return execute(self.parts, x, index, weight, settled.keep)
        return self.repaired(execute, x, index, weight, settled.keep)


def check_way(name: str) -> str:
    """UsageError for a way that does not exist."""
    if name not in WAYS:
        raise UsageError(f"unknown executor '{name}'", f"choose one of: {', '.join(WAYS)}")
    return name
