"""The executor of a model in memory: one of several ways to compute, repaired where the artefact is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import UsageError
from ...model.base import is_expert
from ..base import LayerParts, are_few
from ..compensate import Compensator
from ..repair import Repaired
from ..side_tensors import REPAIR
from . import triton_run
from .base import Executor, Settled, WholeCalls
from .plain import grouped, reference, whole_experts

if TYPE_CHECKING:
    from ..select import Selection
    from .times import LayerTimes

Way = Callable[..., Tensor]
MOSTLY = 0.75  # kept share from which on one product of whole experts takes less time than N of blocks


@cache
def _compiled() -> tuple[ModuleType, ModuleType, ModuleType]:
    """What compiles when it is imported: one_call, tiled and times. An import statement in every call would cost more."""
    from . import one_call, tiled, times

    return one_call, tiled, times


def auto(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor, tally: WholeCalls | None = None) -> Tensor:
    """The fastest way that fits the layer. Shapes as in `plain.reference`."""
    if x.is_cuda:
        return triton_run.deterministic(parts, x, index, weight, keep)
    one_call, tiles, _ = _compiled()
    tally = tally or WholeCalls()
    tally.calls += 1
    if one_call.usable(parts, x) is None:
        return _vectorised(parts, x, index, weight, keep, tally)
    if _whole_is_faster(parts, x, index, keep):
        tally.whole += 1
        return whole_experts(parts, x, index, weight, keep)
    out: Tensor | None = tiles.tiled(parts, x, index, weight, keep)
    return _vectorised(parts, x, index, weight, keep, tally) if out is None else out


def _whole_is_faster(parts: LayerParts, x: Tensor, index: Tensor, keep: Tensor) -> bool:
    """Whether the model's own function takes less time for all slots than the tiles for those that are kept."""
    _, _, measured = _compiled()
    if measured.forced() != "measure":
        return False
    times: LayerTimes = measured.times_of(parts, len(x), index.shape[1])
    return times.stock < times.half or (times.stock < times.tiles and times.stock < times.kept(float(keep.float().mean())))


def _vectorised(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor, tally: WholeCalls) -> Tensor:
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
        self.repaired = Repaired(parts) if REPAIR in parts.tensors else None

    def whole(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """By the tiles where they are faster (`times.py`), else by the model's own function."""
        out = self._whole_by_tiles(x, index, weight) if x.is_cpu and x.dtype == torch.float32 and self.way == "auto" else None
        return self.parts.layer.native(x, index, weight) if out is None else out

    def _whole_by_tiles(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor | None:
        one_call, tiles, measured = _compiled()
        choice = measured.forced()
        if choice == "stock" or not len(x) or one_call.usable(self.parts, x) is None:
            return None
        if choice == "measure" and not measured.times_of(self.parts, len(x), index.shape[1]).tiles_win:
            return None
        whole = measured.whole_parts(self.parts)
        found: Tensor | None = one_call.kept(whole, x, index, weight, None)
        if found is not None:
            return found
        chosen = is_expert(index, self.parts.layer.num_experts).unsqueeze(2)
        out: Tensor | None = tiles.tiled(whole, x, index, weight, chosen)
        return out

    def at_once(self, selection: Selection, extra: Compensator | None) -> tuple[Tensor, Tensor] | None:
        """By `one_call.chosen`, unless whole experts may take less time."""
        x, index = selection.x, selection.index
        if self.way != "auto" or self.repaired is not None or not x.is_cpu or not are_few(x, index):
            return None
        one_call, _, measured = _compiled()
        if measured.forced() == "measure" and not measured.times_of(self.parts, len(x), index.shape[1]).tiles_serve:
            return None
        found: tuple[Tensor, Tensor] | None = one_call.chosen(self.parts, selection, extra)
        self.tally.calls += found is not None
        return found

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
