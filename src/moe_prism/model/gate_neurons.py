"""The part of a layer that selection needs in memory where the experts are elsewhere: on disk, or packed for another engine's kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from .base import ExpertsFn, MoELayer

Activation = Callable[[Tensor | None, Tensor], Tensor]
"""(gate pre-activations or None, up pre-activations) -> activations."""


class GateNeurons(MoELayer):
    """The N r gate neurons of every expert, and the biases of its output, as a layer of that width.

    full_width: neurons of an expert as it is. tensors, float32: gate [E, N r, d] (if there is one), up [E, N r, d], down [E, N r, d], and
    biases where the family has them. activate: the family's own.
    """

    def __init__(self, name: str, index: int, full_width: int, tensors: Mapping[str, Tensor], activate: Activation) -> None:
        self.name, self.index, self.full_width = name, index, full_width
        self.module = nn.Identity()
        self.tensors = {key: t.float() for key, t in tensors.items()}
        self.num_experts, self.width, self.hidden = self.up.shape
        self._activate = activate

    @property
    def gate(self) -> Tensor | None:
        return self.tensors.get("gate")

    @property
    def up(self) -> Tensor:
        return self.tensors["up"]

    @property
    def down(self) -> Tensor:
        return self.tensors["down"].transpose(1, 2)

    @property
    def gate_bias(self) -> Tensor | None:
        return self.tensors.get("gate_bias")

    @property
    def up_bias(self) -> Tensor | None:
        return self.tensors.get("up_bias")

    @property
    def down_bias(self) -> Tensor | None:
        return self.tensors.get("down_bias")

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self._activate(gate, up)

    def install(self, function: ExpertsFn) -> None:
        """Nothing: whoever holds the experts calls the layer."""

    def uninstall(self) -> None:
        """Nothing was installed."""

    def stock(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError(f"the experts of '{self.name}' are not in memory")

    def storage(self) -> tuple[int, ...]:
        return (self.up.data_ptr(),)

    def parameters_per_expert(self) -> int:
        matrices = 3 if self.gate is not None else 2
        biases = (matrices - 1) * self.full_width if self.up_bias is not None else 0
        return matrices * self.hidden * self.full_width + biases + (self.hidden if self.down_bias is not None else 0)
