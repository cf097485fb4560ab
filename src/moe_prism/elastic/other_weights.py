"""A layer with other weights in its views: repaired ones, or those of a width."""

from __future__ import annotations

from torch import Tensor

from ..model import MoELayer
from ..model.around import LayerAround


class OtherWeights(LayerAround):
    """gate (None where there is none), up [E, f, d] and down [E, d, f] instead of the layer's. What the module itself computes stays.

    bias: whether the output bias is the layer's too; else there is none.
    """

    def __init__(self, layer: MoELayer, gate: Tensor | None, up: Tensor, down: Tensor, *, bias: bool = False) -> None:
        self.layer, self._gate, self._up, self._down, self._bias = layer, gate, up, down, bias
        self.name, self.module, self.index = layer.name, layer.module, layer.index
        self.num_experts, self.hidden, self.width = layer.num_experts, layer.hidden, up.shape[1]

    @property
    def gate(self) -> Tensor | None:
        return self._gate

    @property
    def up(self) -> Tensor:
        return self._up

    @property
    def down(self) -> Tensor:
        return self._down

    @property
    def gate_bias(self) -> Tensor | None:
        return self.layer.gate_bias

    @property
    def up_bias(self) -> Tensor | None:
        return self.layer.up_bias

    @property
    def down_bias(self) -> Tensor | None:
        return self.layer.down_bias if self._bias else None

    def storage(self) -> tuple[int, ...]:
        return (*self.layer.storage(), self._up.data_ptr(), self._down.data_ptr())

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return self.layer.stock(x, index, weight)
