"""Neurons that go, as a change of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...errors import UsageError
from ...model import MoELayer
from ...schema import check
from ...schema.points import REMAKE, SliceForm
from ..edit import Edit
from .kept import KeptNeurons
from .mask import clear, sliced

WHERE = "settings of the weight change 'slice'"


@dataclass(frozen=True)
class SliceChange(Edit):
    """Every layer without some of its experts' neurons. `resident_share` is that of experts stored without them, each in its own width."""

    kept: tuple[KeptNeurons, ...]
    name: ClassVar[str] = "slice"

    @classmethod
    def of(cls, masks: Sequence[Tensor]) -> SliceChange:
        """masks: [E, f] (bool) per layer."""
        return cls(tuple(map(KeptNeurons.of, masks)))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> SliceChange:
        rows = check(SliceForm, settings, WHERE, REMAKE).layers
        return cls(tuple(KeptNeurons.from_text(row.experts, row.neurons, row.kept, WHERE) for row in rows))

    def settings(self) -> dict[str, Any]:
        return {"layers": [{"experts": own.experts, "neurons": own.neurons, "kept": own.text} for own in self.kept]}

    def installed(self, model: Any, layers: Sequence[MoELayer]) -> AbstractContextManager[object]:
        return sliced(model, layers, self.masks(layers))

    @property
    def resident_share(self) -> float:
        return sum(own.count for own in self.kept) / sum(own.experts * own.neurons for own in self.kept)

    def check_fits(self, layers: Sequence[MoELayer]) -> None:
        self.masks(layers)

    def changes(self, number: int) -> bool:
        own = self.kept[number]
        return own.count < own.experts * own.neurons

    def edit(self, number: int, layer: MoELayer) -> None:
        clear(layer, self.kept[number].mask())

    def neurons_there(self, layers: Sequence[MoELayer], layer: int) -> Tensor:
        return self.masks(layers)[layer]

    def masks(self, layers: Sequence[MoELayer]) -> list[Tensor]:
        """[E, f] (bool) of every layer. UsageError for another model's."""
        wanted = [(own.experts, own.neurons) for own in self.kept]
        if wanted != [(layer.num_experts, layer.width) for layer in layers]:
            raise UsageError("the neurons that stay are of a model with other experts", REMAKE)
        return [own.mask() for own in self.kept]
