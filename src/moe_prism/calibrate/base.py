"""What a collector sees and what it must be able to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..model import MoELayer


@dataclass(frozen=True)
class RoutedBatch:
    """One batch at one MoE layer. first_token numbers the batch's first token in the whole pass; window is the window length."""

    x: Tensor  # [T, d] layer input, windows one after the other
    index: Tensor  # [T, k] chosen experts; ids outside [0, E) mean "none"
    weight: Tensor  # [T, k] routing weights
    first_token: int
    window: int
    scores: Tensor | None = None  # [T, E] what the router gave every expert; only for collectors that need it
    residual: Tensor | None = None  # [T, d] the residual stream the layer adds to; likewise
    slope: Tensor | None = (
        None  # [T, d] gradient of the loss at the layer's output: with it comes the batch again, on the way back
    )


Kept = tuple[tuple[str | int, ...], torch.dtype]
"""Shape and kind of a statistic: E experts, d hidden, f neurons per expert, C tokens of a reservoir, S <= C of a sample, k experts per
token, or a number.
"""


class Collector(ABC):
    """Mergeable statistics of one layer. Memory must be bounded by the settings, whatever the number of tokens."""

    keeps: ClassVar[Mapping[str, Kept]]
    """What `state` holds; a file is held against it."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of `RoutedBatch` beyond those that are always there. One can be None all the same, in a family that does not show it."""

    has_domains: ClassVar[bool] = False
    """Small sums that add up (`merge`): kept for every domain of the text by itself, and those of all are their sum."""

    def __init__(self, layer: MoELayer, *, capacity: int, seed: int) -> None:
        """capacity: tokens per expert a reservoir may keep."""
        self.layer, self.capacity, self.seed = layer, capacity, seed

    @abstractmethod
    def update(self, batch: RoutedBatch) -> None:
        """Take in what one layer saw of one batch."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything, as named tensors; `load(state())` on a fresh collector continues bit-identically."""

    @abstractmethod
    def load(self, state: dict[str, Tensor]) -> None: ...

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in what another pass over other tokens gathered."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    @staticmethod
    @abstractmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        """Upper bound of the memory held, in bytes."""
