"""What layers share that stand around another one: its activation, and its seam."""

from __future__ import annotations

from torch import Tensor

from .base import ExpertsFn, MoELayer


class LayerAround(MoELayer):
    """`layer` computes what its module does; the views are those of who stands around it."""

    layer: MoELayer

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        return self.layer.activate(gate, up)

    def activate_joined(self, both: Tensor) -> Tensor:
        return self.layer.activate_joined(both)

    def install(self, function: ExpertsFn) -> None:
        self.layer.install(function)

    def uninstall(self) -> None:
        self.layer.uninstall()
