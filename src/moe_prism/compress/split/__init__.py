"""A dense layer as experts: which neuron goes where, a router for them, and their tensors in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UsageError


@dataclass(frozen=True)
class Deal:
    """Neurons of a dense layer: `shared` [S] always run, `experts` [f] each are chosen by a router. Every neuron is in one place."""

    shared: Tensor
    experts: tuple[Tensor, ...]

    def check(self, neurons: int) -> None:
        """ValueError where a neuron is missing or twice, or experts differ in width."""
        every = torch.cat([self.shared, *self.experts])
        if not torch.equal(every.sort().values, torch.arange(neurons)) or len({len(own) for own in self.experts}) != 1:
            raise ValueError(f"a deal must hold each of {neurons} neurons once, in experts of one width")


UNIT = 8
"""The width of an expert is a multiple of it: matrix products of several experts at once want rows of 16 bytes."""


def shared_neurons(neurons: int, experts: int, share: float) -> int:
    """How many neurons always run: those nearest to this share that leave experts of a multiple of `UNIT`, at least one of them.

    UsageError where there are too few neurons for that.
    """
    step = UNIT * experts
    routed = min(max(round((1 - share) * neurons / step), 1), neurons // step)
    if not routed:
        raise UsageError(f"{neurons} neurons make no {experts} experts of {UNIT} or more", "give fewer --experts")
    return neurons - routed * step
