"""The contract of a split: it deals the neurons of a dense layer, each to one expert, or to the one that always runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...compress.split import Deal


@dataclass(frozen=True, kw_only=True)
class DenseSeen:
    """What a split may look at: mean |a| of a layer's neurons [F], over all text and by domain, and what was asked.

    shared: neurons that always run; (F - shared) is divisible by experts.
    """

    neurons: int
    experts: int
    shared: int
    importance: Tensor
    domains: Mapping[str, Tensor] = field(default_factory=dict)
    density: float = 0.5
    seed: int = 0
    layer: int = 0


class SplitMethod(ABC):
    """One way to deal neurons. shared: the share that always runs where nobody says; needs_domains: whether text must have some."""

    shared: ClassVar[float] = 0.25
    needs_domains: ClassVar[bool] = False

    @abstractmethod
    def deal(self, seen: DenseSeen) -> Deal:
        """Every neuron once."""

    def facts(self, seen: DenseSeen) -> dict[str, Any]:
        """What else there is to say of a layer."""
        return {}


def snake(order: Tensor, experts: int) -> list[Tensor]:
    """Neurons in falling order dealt one row after the other, every second row backwards: experts are then equally strong."""
    rows = order.view(-1, experts).clone()
    rows[1::2] = rows[1::2].flip(1)
    return list(rows.T.contiguous())


def by_strength(values: Tensor) -> Tensor:
    """Neurons [F], strongest first; of equal ones the lower number."""
    return torch.sort(values, descending=True, stable=True).indices
