"""The residual stream at an MoE layer: what the norm that feeds the layer was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..model import MoELayer
from ..model.norms import is_norm


@contextmanager
def watch_residual(model: nn.Module, layer: MoELayer) -> Iterator[Callable[[Tensor], Tensor | None]]:
    """Yields residual(x): the residual stream [T, d] of the layer's input x [T, d] in the forward pass that runs; None: not seen.

    It is the input of the module of the same decoder layer whose output x is, the very memory; no family's names are needed.
    """
    block = layer.name.rpartition(".")[0]
    decoder = model.get_submodule(block.rpartition(".")[0])
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            seen[module] = inputs[0], output

    def residual(x: Tensor) -> Tensor | None:
        found = [before for before, after in seen.values() if after.data_ptr() == x.data_ptr() and after.numel() == x.numel()]
        seen.clear()  # the tensors of a layer must not outlive it
        return found[-1].reshape(x.shape) if found else None

    norms = [m for m in decoder.modules() if is_norm(m, layer.hidden)]
    handles = [module.register_forward_hook(note) for module in norms]
    try:
        yield residual
    finally:
        for handle in handles:
            handle.remove()
