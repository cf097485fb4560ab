"""What a layer, and whoever binds points to it, may ask of the model they belong to (`runtime.Elastic`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ..model import MoELayer
from ..point import OperatingPoint
from .base import LayerParts
from .execute.base import Executor

if TYPE_CHECKING:
    from ..attention.watch import Attended


class Host(Protocol):
    """The elastic state of a model, as its layers see it."""

    model: Any
    step: Any  # `bind.Step`: what the forward that runs is at
    carried: dict[str, Tensor]
    counting: bool
    always_split: bool
    woven: bool  # whether tokens may have adapters
    stored_bytes_per_weight: float

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def k(self) -> int | None: ...

    def source_layers(self) -> Sequence[MoELayer]:
        """The layers with their experts as the checkpoint has them: shapes, where the weights are elsewhere."""

    def normalises(self) -> bool:
        """Whether the router scales the weights of its choice to a constant sum."""

    def check(self, point: OperatingPoint) -> None:
        """UsageError for a point that this model cannot run where its weights are."""

    def residual(self, layer: int, x: Tensor) -> Tensor: ...

    def attended(self, tokens: int) -> Attended:
        """What the attention before the layer that runs was asked, for so many tokens."""

    def executor_of(self, parts: LayerParts) -> Executor: ...
