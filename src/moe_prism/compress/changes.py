"""Changes of weights that a loaded model can be run under, as the `weights` part of an operating point says them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor

from ..model import MoELayer
from ..point import WeightChange
from ..registry import Registry


class Change(ABC):
    """One change, from its plain settings and back."""

    name: ClassVar[str]
    touches_weights: ClassVar[bool] = False
    """Whether the weights themselves become others, so that they must be in memory."""

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Change:
        """CorruptError for settings that are not of this change."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain JSON values."""

    @abstractmethod
    def installed(self, model: Any, layers: Sequence[MoELayer]) -> AbstractContextManager[object]:
        """Run the model changed inside the block. Entering and leaving are quick; leaving restores the model to the bit.

        UsageError for a model that the change was not made for.
        """

    @property
    @abstractmethod
    def resident_share(self) -> float:
        """Expert weights that stay in memory / all expert weights."""

    @property
    def resident_values(self) -> int:
        """Numbers that stay in memory beside those."""
        return 0

    def bytes_per_weight(self, layers: Sequence[MoELayer], layer: int, stored: float) -> Tensor | None:
        """[E] (float64): bytes that a weight of each expert's matrices takes, scales included; None: what it is `stored` in."""
        return None

    def neurons_there(self, layers: Sequence[MoELayer], layer: int) -> Tensor | None:
        """[E, f] (bool): the neurons of each expert that are there; None: all of them."""
        return None

    def experts_there(self, layers: Sequence[MoELayer], layer: int) -> Tensor | None:
        """[E] (bool): the experts that are in memory; None: all of them."""
        return None

    def same_weights(self, layers: Sequence[MoELayer], layer: int) -> Tensor | None:
        """[E]: for every expert the one whose weights it shares; None: each has its own."""
        return None

    def part(self) -> WeightChange:
        """The part of an operating point that says this change."""
        return WeightChange(change=self.name, settings=self.settings())


weight_changes: Registry[type[Change]] = Registry(
    "weight change",
    {
        "prune": ("moe_prism.compress.prune.change:PruneChange", "experts that are not there any more"),
        "merge": ("moe_prism.compress.merge.change:MergeChange", "experts that share one set of weights"),
        "sparse": ("moe_prism.compress.sparse:SparseChange", "single weights that are zeros"),
        "chain": ("moe_prism.compress.chain:ChainChange", "several of these, one after the other"),
        "subspace": (
            "moe_prism.compress.merge.subspace:SubspaceChange",
            "experts that share one set of weights, as thin matrices",
        ),
        "rehome": (
            "moe_prism.compress.merge.rehome:RehomeChange",
            "experts that are not there any more, with their neurons in others",
        ),
        "slice": ("moe_prism.compress.slice.change:SliceChange", "neurons that are not there any more"),
        "bands": ("moe_prism.compress.quantize.bands:BandChange", "neurons in fewer bits, each at a width of its own"),
        "smooth": ("moe_prism.compress.quantize.smoothed:SmoothChange", "experts in fewer bits behind evened-out inputs"),
        "quantize": ("moe_prism.compress.quantize.change:QuantizeChange", "experts in fewer bits, by a codec"),
    },
)


def change_of(part: WeightChange) -> Change:
    """The change that a part of an operating point says."""
    return weight_changes.get(part.change).from_settings(part.settings)
