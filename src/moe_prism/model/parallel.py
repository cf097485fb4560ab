"""Experts as two modules with a 3-D weight each, inside the block that routes: it sorts rows by expert and calls both (JetMoe)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import ExpertsFn
from .forward import ForwardLayer


def is_parallel(module: nn.Module) -> bool:
    """Without `activation` it is JetMoe's mixture of attention, whose experts are no MLPs."""
    weights = [getattr(getattr(module, name, None), "weight", None) for name in ("input_linear", "output_linear")]
    tensors = all(isinstance(w, Tensor) and w.ndim == 3 for w in weights)
    return tensors and hasattr(module, "router") and callable(getattr(module, "activation", None)) and hasattr(module, "bias")


class ParallelLayer(ForwardLayer):
    """`input_linear.weight` [E, 2f, d] and `output_linear.weight` [E, d, f] of a block whose `bias` [d] is added once per token."""

    calls_with_ids = False

    def __init__(self, name: str, module: nn.Module, index: int) -> None:
        self.name, self.module, self.index = name, module, index
        self.num_experts, self.hidden, self.width = self.down.shape

    @property
    def block_name(self) -> str:
        return self.name

    @property
    def owners(self) -> tuple[str, ...]:
        return f"{self.name}.input_linear", f"{self.name}.output_linear"

    @property
    def gate(self) -> Tensor:
        return self.module.input_linear.weight[:, : self.width]  # type: ignore[index, union-attr]

    @property
    def up(self) -> Tensor:
        return self.module.input_linear.weight[:, self.width :]  # type: ignore[index, union-attr]

    @property
    def down(self) -> Tensor:
        return self.module.output_linear.weight  # type: ignore[return-value, union-attr]

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self.module.activation(gate) * up  # type: ignore[no-any-return, operator]

    def arrange(self) -> None:
        weight: Tensor = self.down
        weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)

    def storage(self) -> tuple[int, ...]:
        return self.up.data_ptr(), self.down.data_ptr()

    def adapted(self, function: ExpertsFn) -> Callable[..., Any]:
        module: Any = self.module

        def forward(layer_input: Tensor) -> Tensor:
            x = layer_input.reshape(-1, self.hidden)
            # the choices sorted by expert: their places among T k, their routing weights; and how many every expert has
            order, _, gates, sizes, _ = module.router(x)
            ids = torch.arange(self.num_experts, device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
            index, weight = torch.empty_like(ids), torch.empty_like(gates)
            index[order], weight[order] = ids, gates
            shape = len(x), module.router.top_k
            return function(x, index.view(shape), weight.view(shape)).reshape(layer_input.shape) + module.bias  # type: ignore[no-any-return]

        return forward

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """By the block's own modules, without its router and bias. Ids outside [0, E) are no expert."""
        module: Any = self.module
        flat = index.reshape(-1)
        place = flat.masked_fill(flat < 0, self.num_experts).argsort(stable=True)
        place = place[: int(((flat >= 0) & (flat < self.num_experts)).sum())]
        rows, sizes = place // index.shape[1], torch.bincount(flat[place], minlength=self.num_experts).tolist()
        gate, up = module.input_linear(x[rows], sizes).chunk(2, -1)
        out = module.output_linear(module.activation(gate) * up, sizes) * weight.reshape(-1)[place, None]
        return torch.zeros_like(x).index_add_(0, rows, out.to(x.dtype))

    @torch.no_grad()
    def refusal(self, model: nn.Module) -> str | None:
        """The seam itself is proved: with `stock` in it the block computes what it computes without."""
        if self.up.is_meta:
            return None
        x = torch.randn(1, 4, self.hidden, generator=torch.Generator().manual_seed(0)).to(self.up.device, self.up.dtype)
        whole: Tensor = type(self.module).forward(self.module, x)
        if torch.allclose(whole, self.adapted(self.stock)(x), rtol=5e-2, atol=1e-3 * float(whole.abs().max())):
            return None
        return "its block adds something else than its experts and a bias"
