"""The contract of a pruning criterion. Shapes: E experts of the layer, k experts per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import UsageError
from ...options.prune import ExpertForm


@dataclass(frozen=True)
class LayerSubject:
    """One layer as a criterion sees it. values: collector -> statistic -> tensor; protected [E] (bool): experts that will stay."""

    layer: int
    name: str
    experts: int
    per_token: int
    values: Mapping[str, Mapping[str, Tensor]]
    protected: Tensor
    seed: int = 0

    def of(self, collector: str) -> Mapping[str, Tensor]:
        """The statistics of one collector. UsageError if the pass did not run it."""
        if collector not in self.values:
            raise UsageError(
                f"the calibration holds no '{collector}'",
                f"calibrate with --collectors ...,{collector}, or leave --calibration out",
            )
        return self.values[collector]


class Criterion(ABC):
    """Ranks the experts of a layer. The same file serves per-layer and global allocation, mask mode and removal."""

    acts: ClassVar[str] = "weights"
    paper: ClassVar[str] = ""
    """Where it comes from; empty: our own."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Collectors it reads."""

    is_blind: ClassVar[bool] = False
    """Ranks by position or chance: what it gives in one layer says nothing about another, so it is never allocated globally."""

    form: ClassVar[ExpertForm] = "removed"
    """What it was made to leave of an expert; see `options.prune`."""

    is_absolute: ClassVar[bool] = False
    """Scores of different layers compare as they are; else each layer's are divided by their sum before they are ranked together."""

    @abstractmethod
    def scores(self, subject: LayerSubject) -> Tensor:
        """[E] (float64): what is lost without each expert; the highest stay, ties go to the lower id."""
