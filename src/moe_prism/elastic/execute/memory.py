"""The executor of a model in memory: one of several ways to compute, repaired where the artefact is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ...errors import UsageError
from ..base import LayerParts
from ..repair import Repaired
from ..side_tensors import REPAIR
from . import triton_run
from .base import Executor, Settled
from .plain import grouped, reference

Way = Callable[..., Tensor]


def auto(parts: LayerParts, x: Tensor, index: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """The fastest way that fits the layer. Shapes as in `plain.reference`."""
    if x.is_cuda:
        return triton_run.deterministic(parts, x, index, weight, keep)
    from .tiled import tiled  # compiles on first use

    out = tiled(parts, x, index, weight, keep)
    return grouped(parts, x, index, weight, keep) if out is None else out


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
        return self.parts.layer.native(x, index, weight)

    def run(self, x: Tensor, index: Tensor, weight: Tensor, settled: Settled) -> Tensor:
        execute = WAYS[self.way]
        if self.repaired is None:
            return execute(self.parts, x, index, weight, settled.keep)
        return self.repaired(execute, x, index, weight, settled.keep)


def check_way(name: str) -> str:
    """UsageError for a way that does not exist."""
    if name not in WAYS:
        raise UsageError(f"unknown executor '{name}'", f"choose one of: {', '.join(WAYS)}")
    return name
