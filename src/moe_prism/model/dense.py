"""A dense MLP presented as a layer of one expert (E=1, routing weight 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import ExpertsFn
from .forward import ForwardLayer

NAMES: tuple[tuple[str | None, str, str], ...] = (
    # (gate, up, down) attribute names, as the dense families spell them; the same name twice = [gate | up] in one Linear
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


def dense_names(module: nn.Module) -> tuple[str | None, str, str] | None:
    """Which of NAMES this module follows, or None."""
    if not any(callable(getattr(module, a, None)) for a in ACTIVATIONS):
        return None
    for names in NAMES:
        if all(isinstance(getattr(module, n, None), nn.Linear) for n in names if n):
            return names
    return None


class DenseLayer(ForwardLayer):
    """SwiGLU, GeGLU or plain MLP of three or two Linear modules."""

    def __init__(self, name: str, module: nn.Module, index: int) -> None:
        self.name, self.module, self.index = name, module, index
        names = dense_names(module)
        assert names is not None
        self._names = names
        self.num_experts = 1
        self.hidden, self.width = getattr(module, names[2]).weight.shape
        self._fused = names[0] == names[1]
        self._act: Any = next(getattr(module, a) for a in ACTIVATIONS if callable(getattr(module, a, None)))

    def _tensor(self, which: int, attribute: str) -> Tensor | None:
        """The weight or bias of gate (0), up (1) or down (2) with a leading expert dimension."""
        name = self._names[which]
        tensor: Tensor | None = getattr(getattr(self.module, name), attribute) if name else None
        if tensor is None:
            return None
        if self._fused and which < 2:
            tensor = tensor[: self.width] if which == 0 else tensor[self.width :]
        return tensor[None]

    @property
    def gate(self) -> Tensor | None:
        return self._tensor(0, "weight")

    @property
    def up(self) -> Tensor:
        return self._tensor(1, "weight")  # type: ignore[return-value]

    @property
    def down(self) -> Tensor:
        return self._tensor(2, "weight")  # type: ignore[return-value]

    @property
    def gate_bias(self) -> Tensor | None:
        return self._tensor(0, "bias")

    @property
    def up_bias(self) -> Tensor | None:
        return self._tensor(1, "bias")

    @property
    def down_bias(self) -> Tensor | None:
        return self._tensor(2, "bias")

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self._act(up) if gate is None else self._act(gate) * up  # type: ignore[no-any-return]

    def adapted(self, function: ExpertsFn) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            index = torch.zeros(flat.shape[0], 1, dtype=torch.long, device=x.device)
            return function(flat, index, torch.ones_like(index, dtype=x.dtype)).reshape(x.shape)

        return forward

    def arrange(self) -> None:
        """The last Linear keeps its shape but is stored neuron by neuron, as `FusedLayer.arrange` does."""
        weight = getattr(self.module, self._names[2]).weight
        weight.data = weight.data.T.contiguous().T

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return type(self.module).forward(self.module, x) * weight  # type: ignore[no-any-return]
