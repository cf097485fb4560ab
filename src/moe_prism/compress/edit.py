"""Changes that put other weights in the places of the experts' own, layer by layer: one description for memory and for files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..model import MoELayer
from .changes import Change
from .prune.choice import KeptExperts
from .prune.mask import pruned
from .quantize.decoded import encodings_hold
from .slice.mask import per_neuron


class Edit(Change):
    """What becomes of the weights of a layer, and which of its experts stay."""

    touches_weights: ClassVar[bool] = True

    @abstractmethod
    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        """UsageError for another model."""

    @abstractmethod
    def changes(self, number: int) -> bool:
        """Whether any weight of a layer becomes another."""

    @abstractmethod
    def edit(self, number: int, layer: MoELayer) -> None:
        """Write the new weights into a layer that is in memory. What they are is a function of the old ones alone."""

    @property
    def staying(self) -> tuple[KeptExperts, ...] | None:
        """Which experts of every layer are there afterwards; None: all."""
        return None

    def experts_there(self, layers: Sequence[MoELayer], layer: int) -> Tensor | None:
        return None if self.staying is None else self.staying[layer].mask()

    def installed(self, model: Any, layers: Sequence[MoELayer]) -> AbstractContextManager[object]:
        self.check_fits(layers)
        return edited(model, layers, self)


@contextmanager
@torch.no_grad()
def edited(model: Any, layers: Sequence[MoELayer], edit: Edit) -> Iterator[None]:
    """Run a model edited inside the block; the weights are as they were after it, to the bit. Layers that change are copied meanwhile."""
    changed = [number for number in range(len(layers)) if edit.changes(number)]
    whole = [KeptExperts(x.num_experts, tuple(range(x.num_experts))) for x in layers]
    with pruned(model, edit.staying or whole, layers), encodings_hold(model, layers):
        saved = {number: [view.clone() for view in expert_views(layers[number])] for number in changed}
        try:
            for number in changed:
                edit.edit(number, layers[number])
            yield
        finally:
            for number, before in saved.items():
                for view, values in zip(expert_views(layers[number]), before, strict=True):
                    view.copy_(values)


def expert_views(layer: MoELayer) -> list[Tensor]:
    """All weights of the experts: those of single neurons, and the output bias."""
    return [*per_neuron(layer), *([] if layer.down_bias is None else [layer.down_bias.detach()])]
