"""Experts modules called as experts(hidden, index, weight) that have no decorator: as 3-D tensors, or as rows of 2-D tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import ExpertLayout, ExpertsFn
from .extra import ExtraExperts, Kind
from .forward import ForwardLayer
from .fused import FusedLayer


def takes_routing(module: nn.Module) -> bool:
    """Whether its class's forward takes three arguments: hidden states, expert ids and routing weights by the families' habit."""
    return len(inspect.signature(type(module).forward).parameters) == 4  # and self


def is_plain(module: nn.Module) -> bool:
    """Whether a module is called as experts(hidden, ids, weights) without the decorator."""
    first, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    tensors = all(isinstance(w, Tensor) and w.ndim == 3 for w in (first, down))
    return tensors and takes_routing(module) and callable(getattr(module, "act_fn", None))


class PlainCall(ForwardLayer):
    """The seam: the module's own forward has the shape of an experts function.

    Extra experts of the model's own are added here, whatever function is installed. For a function, and for `stock`, their ids mean no
    expert.
    """

    copies: ExtraExperts | None = None

    def adapted(self, function: ExpertsFn) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            x = hidden_states.reshape(-1, self.hidden)
            out = function(x, top_k_index, top_k_weights)
            extra = self.copies
            more = None if extra is None else extra(x, top_k_index, top_k_weights, self.num_experts)
            return (out if more is None else out + more.to(out.dtype)).reshape(hidden_states.shape)

        return forward

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Ids outside [0, E) are computed with weight 0: by an extra expert, which costs nothing, or by the first one."""
        none = (index < 0) | (index >= self.num_experts)
        index = index.masked_fill(none, self.num_experts if self.copies else 0)
        return self._own(x, index, weight.masked_fill(none, 0)).reshape(x.shape)

    def _own(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The class's own forward, extra experts included."""
        if self.copies and index.shape[1] == 1:  # LongCat-Flash's squeezes a single choice away: beside it one of weight 0
            index, weight = nn.functional.pad(index, (0, 1), value=self.num_experts), nn.functional.pad(weight, (0, 1))
        return type(self.module).forward(self.module, x, index, weight)  # type: ignore[no-any-return]

    def native(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.stock(x, index, weight)


class PlainLayer(PlainCall, FusedLayer):
    """`gate_up_proj` [E, 2f, d] and `down_proj` [E, d, f], or both transposed. Rows of gate_up_proj beyond E belong to extra experts."""

    def __init__(self, name: str, module: nn.Module, index: int) -> None:
        super().__init__(name, module, index)
        copies = len(super()._first()) - self.num_experts
        copy: Kind = "copy"
        self.extra = self.copies = ExtraExperts((copy,) * copies) if copies else None  # LongCat-Flash; `refusal` proves it

    def _layout(self) -> ExpertLayout:
        first: Any = self.module.gate_up_proj
        down: Any = self.module.down_proj
        return ExpertLayout(is_transposed=first.shape[1] == down.shape[2])

    def _first(self) -> Tensor:
        return super()._first()[: self.num_experts]

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if hasattr(self.module, "_apply_gate"):
            return super().activate(gate, up)
        return self.module.act_fn(gate) * up  # type: ignore[no-any-return, operator]

    def activate_joined(self, both: Tensor) -> Tensor:
        return self.activate(*both.chunk(2, -1))

    @torch.no_grad()
    def refusal(self, model: nn.Module) -> str | None:
        extra = self.copies
        if extra is None or self.up.is_meta:
            return super().refusal(model)
        x = torch.randn(2, self.hidden, generator=torch.Generator().manual_seed(0)).to(self.up.device, self.up.dtype)
        ids = torch.arange(len(extra), device=x.device).expand(2, -1) + self.num_experts
        weight = torch.linspace(1, 2, len(extra)).to(x).expand(2, -1)
        mine = extra(x, ids, weight, self.num_experts)
        if mine is None or not torch.allclose(mine, self._own(x, ids, weight).float(), rtol=5e-2, atol=1e-3):
            return f"its experts from {self.num_experts} on are not copies of their input"
        return super().refusal(model)


def is_flat(module: nn.Module) -> bool:
    """Whether a module holds the rows of all its experts in 2-D tensors."""
    mlp = getattr(module, "mlp", None)
    tensors = all(isinstance(w, Tensor) and w.ndim == 2 for w in (getattr(mlp, name, None) for name in ("w1", "v1", "w2")))
    return tensors and takes_routing(module) and isinstance(getattr(module, "num_experts", None), int)


class FlatLayer(PlainCall):
    """`mlp.w1`, `mlp.v1` and `mlp.w2` [E f, d], the experts one below the other (DBRX)."""

    def __init__(self, name: str, module: nn.Module, index: int) -> None:
        self.name, self.module, self.index = name, module, index
        self.num_experts: int = module.num_experts  # type: ignore[assignment]
        _, self.width, self.hidden = self.up.shape

    def _rows(self, name: str) -> Tensor:
        w: Tensor = getattr(self.module.mlp, name)
        return w.view(self.num_experts, -1, w.shape[1])

    @property
    def gate(self) -> Tensor:
        return self._rows("w1")

    @property
    def up(self) -> Tensor:
        return self._rows("v1")

    @property
    def down(self) -> Tensor:
        return self._rows("w2").transpose(1, 2)

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self.module.mlp.activation_fn(gate) * up  # type: ignore[no-any-return, union-attr, operator]
