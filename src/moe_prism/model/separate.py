"""Experts as one module each in a ModuleDict, called with a mask instead of ids (Switch Transformers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import ExpertsFn
from .forward import ForwardLayer
from .plain import takes_routing


def is_separate(module: nn.Module) -> bool:
    """Whether a module holds every expert as a module of its own."""
    if not isinstance(module, nn.ModuleDict) or len(module) < 2 or not takes_routing(module):
        return False
    return all(_is_linear(expert, "wi") and _is_linear(expert, "wo") and hasattr(expert, "act") for expert in module.values())


def _is_linear(expert: nn.Module, name: str) -> bool:
    linear = getattr(expert, name, None)
    return isinstance(linear, nn.Linear) and linear.bias is None


class SeparateLayer(ForwardLayer):
    """`wi` [f, d] and `wo` [d, f] of every expert, ungated. Their weights are moved into one tensor each, so that views of all exist.

    `arrange` leaves them: transformers cannot save transposed tensors that share a storage.
    """

    calls_with_ids = False
    top_k = 1  # the configuration does not name it

    def __init__(self, name: str, module: nn.Module, index: int) -> None:
        self.name, self.module, self.index = name, module, index
        self._experts: list[Any] = list(module.values())  # type: ignore[operator]
        self.num_experts = len(self._experts)
        self.width, self.hidden = self._experts[0].wi.weight.shape

    @property
    def gate(self) -> None:
        return None

    @property
    def up(self) -> Tensor:
        return _joined([expert.wi.weight for expert in self._experts])

    @property
    def down(self) -> Tensor:
        return _joined([expert.wo.weight for expert in self._experts])

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self._experts[0].act(up)  # type: ignore[no-any-return]

    def adapted(self, function: ExpertsFn) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
            # selected [T, k, E]: one 1 per row, or none where the expert had no capacity left
            index = selected_experts.argmax(-1).masked_fill(~selected_experts.any(-1), -1)
            return function(hidden_states, index, routing_weights)

        return forward

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Ids outside [0, E) are no expert."""
        mask = (index[:, :, None] == torch.arange(self.num_experts, device=index.device)).long()
        return type(self.module).forward(self.module, x, mask, weight)  # type: ignore[no-any-return]


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """One view [E, *shape] of E weights, which are moved into one tensor unless they already lie in one at equal distances."""
    first = weights[0]
    if first.is_meta:
        return torch.empty(len(weights), *first.shape, dtype=first.dtype, device="meta")
    if not _is_regular(weights):
        for weight, part in zip(weights, torch.stack([w.detach() for w in weights]), strict=True):
            weight.data = part
    step = weights[1].storage_offset() - first.storage_offset()
    return torch.as_strided(first.detach(), (len(weights), *first.shape), (step, *first.stride()), first.storage_offset())


def _is_regular(weights: Sequence[Tensor]) -> bool:
    first, step = weights[0], weights[1].storage_offset() - weights[0].storage_offset()
    home = first.untyped_storage().data_ptr()
    return step > 0 and all(
        w.untyped_storage().data_ptr() == home
        and w.storage_offset() == first.storage_offset() + i * step
        and w.stride() == first.stride()
        for i, w in enumerate(weights)
    )
