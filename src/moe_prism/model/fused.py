"""Experts stored as 3-D tensors behind transformers' experts interface: every current MoE family."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoint.constant import VALUE
from . import hook
from .base import ExpertLayout, ExpertsFn, MoELayer, is_expert
from .extra import constants

FLAGS = ("is_concatenated", "is_transposed", "has_bias", "has_gate")


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds its experts as 3-D tensors behind transformers' decorator."""
    if not all(hasattr(module, flag) for flag in FLAGS) or not hasattr(type(module).forward, "__wrapped__"):
        return False
    first = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    down = getattr(module, "down_proj", None)
    return all(isinstance(w, Tensor) and w.ndim == 3 for w in (first, down))


class FusedLayer(MoELayer):
    """`gate_up_proj` [E, 2f, d] (or transposed, or interleaved, or `up_proj` alone) and `down_proj` [E, d, f]."""

    def __init__(self, name: str, module: nn.Module, index: int) -> None:
        self.name, self.module, self.index = name, module, index
        self.layout = self._layout()
        self.num_experts, self.hidden, self.width = self.down.shape
        vectors = getattr(module, VALUE, None)
        if isinstance(vectors, Tensor):  # its hooks add them, see `checkpoint.constant`
            self.extra, self.router_rows = constants(vectors), module.router_rows  # type: ignore[assignment]

    def _layout(self) -> ExpertLayout:
        return ExpertLayout(**{flag: bool(getattr(self.module, flag)) for flag in FLAGS})

    def _first(self) -> Tensor:
        """Pre-activation rows of all experts [E, 2f or f, d]."""
        w: Tensor = self.module.gate_up_proj if self.layout.has_gate else self.module.up_proj  # type: ignore[assignment]
        return w.transpose(1, 2) if self.layout.is_transposed else w

    def _half(self, rows: Tensor, second: bool) -> Tensor:
        """Gate (first) or up (second) part of dimension 1."""
        if self.layout.is_concatenated:
            half = rows.shape[1] // 2
            return rows[:, half:] if second else rows[:, :half]
        return rows[:, 1::2] if second else rows[:, ::2]

    @property
    def gate(self) -> Tensor | None:
        return self._half(self._first(), second=False) if self.layout.has_gate else None

    @property
    def up(self) -> Tensor:
        return self._half(self._first(), second=True) if self.layout.has_gate else self._first()

    @property
    def down(self) -> Tensor:
        w: Tensor = self.module.down_proj  # type: ignore[assignment]
        return w.transpose(1, 2) if self.layout.is_transposed else w

    @property
    def gate_bias(self) -> Tensor | None:
        """[E, f]: the gate half of the bias before the activation."""
        if not (self.layout.has_bias and self.layout.has_gate):
            return None
        return self._half(self.module.gate_up_proj_bias, second=False)  # type: ignore[arg-type]

    @property
    def up_bias(self) -> Tensor | None:
        """[E, f]: the up half of the bias before the activation."""
        if not self.layout.has_bias:
            return None
        if not self.layout.has_gate:
            return self.module.up_proj_bias  # type: ignore[return-value]
        return self._half(self.module.gate_up_proj_bias, second=True)  # type: ignore[arg-type]

    @property
    def down_bias(self) -> Tensor | None:
        return self.module.down_proj_bias if self.layout.has_bias else None  # type: ignore[return-value]

    def refusal(self, model: nn.Module) -> str | None:
        if getattr(self.module, "has_post_expert_norm", False):  # a flag newer than 5.19
            return "it normalizes the output of each expert, so sub-experts do not add up to it"
        return None

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return self.module.act_fn(up)  # type: ignore[no-any-return, operator]
        both = torch.cat([gate, up], -1) if self.layout.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        return self.module._apply_gate(both)  # type: ignore[no-any-return, operator]

    def activate_joined(self, both: Tensor) -> Tensor:
        if self.layout.has_gate and self.layout.is_concatenated:
            return self.module._apply_gate(both)  # type: ignore[no-any-return, operator]
        return super().activate_joined(both)

    def install(self, function: ExpertsFn) -> None:
        hook.install(self.module, function)

    def uninstall(self) -> None:
        hook.uninstall(self.module)

    def arrange(self) -> None:
        """Every weight keeps its shape but is stored neuron by neuron: a block of neurons is then one piece of memory.

        Measured on a CPU (benchmarks/layer.py): the stock layer gains a quarter as well.
        """
        first = "gate_up_proj" if self.layout.has_gate else "up_proj"
        parameter: Tensor = getattr(self.module, first if self.layout.is_transposed else "down_proj")
        parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)

    def storage(self) -> tuple[int, ...]:
        # asked for at every layer of a step: a module finds its attributes slowly
        own = self.module._parameters
        first, down = own.get("gate_up_proj" if self.layout.has_gate else "up_proj"), own.get("down_proj")
        if first is None or down is None:  # they are no parameters
            return self._first().data_ptr(), self.module.down_proj.data_ptr()  # type: ignore[operator]
        return first.data_ptr(), down.data_ptr()

    def native(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if x.dtype != self.down.dtype:
            return self.by_expert(x, index, weight)
        return hook.native(self.module, x, *self._computed(index, weight))

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if x.dtype != self.down.dtype:
            return self.by_expert(x, index, weight)
        return hook.stock_forward(self.module)(self.module, x, *self._computed(index, weight))  # type: ignore[no-any-return]

    def _computed(self, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ids of no expert as expert 0 with weight 0, where there can be any: the family's own forward does not know them."""
        if self.extra is None:
            return index, weight
        none = ~is_expert(index, self.num_experts)
        return index.masked_fill(none, 0), weight.masked_fill(none, 0)
