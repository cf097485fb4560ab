"""Experts whose routing weight multiplies their input, not their output, each called with a row per token (Llama 4).

An expert is not linear: weight * expert(x) is not expert(weight * x). With one expert per token the layer is still a sum of the form
we need, that of the scaled input with weight 1. With several, every choice would need an input of its own: refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import ExpertLayout, ExpertsFn
from .forward import ForwardLayer
from .fused import FusedLayer


def is_scaled_input(module: nn.Module) -> bool:
    """Whether a module is called with rows that are sorted by expert and scaled already."""
    first, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    tensors = all(isinstance(w, Tensor) and w.ndim == 3 for w in (first, down))
    return tensors and list(inspect.signature(type(module).forward).parameters) == ["self", "hidden_states"]


class ScaledInputLayer(ForwardLayer, FusedLayer):
    """`gate_up_proj` [E, d, 2f] and `down_proj` [E, f, d]. Functions see x already multiplied by the routing weight, and weight 1."""

    calls_with_ids = False
    weighs_input = True

    def _layout(self) -> ExpertLayout:
        return ExpertLayout(is_transposed=True)

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self.module.act_fn(gate) * up  # type: ignore[no-any-return, operator]

    def activate_joined(self, both: Tensor) -> Tensor:
        return self.activate(*both.chunk(2, -1))

    def adapted(self, function: ExpertsFn) -> Callable[..., Any]:
        def forward(hidden_states: Tensor) -> Tensor:
            routed = hidden_states.view(self.num_experts, -1, self.hidden)  # zeros where a token did not choose the expert
            chosen = (routed != 0).any(-1)
            index = chosen.int().argmax(0)  # an input of zeros counts as a choice of expert 0, which gives zeros
            token = torch.arange(len(index), device=index.device)
            weight = torch.ones(len(index), 1, dtype=routed.dtype, device=index.device)
            out = torch.zeros_like(routed)
            out[index, token] = function(routed[index, token], index[:, None], weight)
            return out.view(-1, self.hidden)

        return forward

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x is the scaled input. Ids outside [0, E) are no expert."""
        none = (index < 0) | (index >= self.num_experts)
        index, weight = index.masked_fill(none, 0), weight.masked_fill(none, 0)
        token = torch.arange(len(x), device=x.device)[:, None]
        routed = x.new_zeros(self.num_experts, *x.shape)
        routed[index, token] = x[:, None].expand(*index.shape, -1)
        out: Tensor = type(self.module).forward(self.module, routed.view(-1, self.hidden))
        return (out.view(routed.shape)[index, token] * weight[:, :, None]).sum(1)

    def native(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.stock(x, index, weight)

    def refusal(self, model: nn.Module) -> str | None:
        k = getattr(model.get_submodule(self.block_name), "top_k", None)
        if k != 1:
            return (
                f"it multiplies the inputs of its experts by routing weights, and a token has {k or 'an unknown number'} of them"
            )
        return None
