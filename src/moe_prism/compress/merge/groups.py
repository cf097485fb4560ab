"""Which experts of a layer become one, and with which neurons on top of each other. Shapes: E experts, f neurons each, d hidden."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...errors import CorruptError
from ...model import MoELayer
from ...schema.points import REMAKE
from ..slice.mask import per_neuron


@dataclass(frozen=True)
class MergedExperts:
    """groups: for every expert the one that stands for its group; weights: its part in the mean; orders: for every expert the neurons
    [f] that come to lie on those of the one that stands for it, as little-endian numbers of 32 bits; empty: as they are.
    """

    neurons: int
    groups: tuple[int, ...]
    weights: tuple[float, ...]
    orders: bytes = b""

    def check(self, where: str) -> None:
        """CorruptError for groups that are none."""
        experts = len(self.groups)
        good = len(self.weights) == experts and all(0 <= g < experts and self.groups[g] == g for g in self.groups)
        if not good or any(not sum(self.weights[e] for e in members) > 0 for members in self.members()):
            raise CorruptError(f"{where}: the groups of a layer are none", REMAKE)
        if self.orders:
            wrong = len(self.orders) != 4 * experts * self.neurons
            if wrong or not torch.equal(self.order().sort(1).values, torch.arange(self.neurons).expand(experts, -1)):
                raise CorruptError(f"{where}: the neurons of a layer are in no order", REMAKE)

    @staticmethod
    def orders_of(text: str, where: str) -> bytes:
        """The inverse of `text`. CorruptError for what is no base64."""
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as error:
            raise CorruptError(f"{where}: the orders of a layer are no base64", REMAKE) from error

    @property
    def text(self) -> str:
        """The orders as base64, for JSON."""
        return base64.b64encode(self.orders).decode()

    def order(self) -> Tensor:
        """[E, f]."""
        if not self.orders:
            return torch.arange(self.neurons).expand(len(self.groups), -1)
        return torch.from_numpy(np.frombuffer(self.orders, "<i4").astype(np.int64)).view(-1, self.neurons)

    def members(self) -> list[list[int]]:
        """The experts of every group, by the one that stands for it."""
        return [[e for e, own in enumerate(self.groups) if own == g] for g in sorted(set(self.groups))]


def orders_bytes(order: Tensor) -> bytes:
    """[E, f] as `MergedExperts.orders`."""
    return order.numpy().astype("<i4").tobytes()


@torch.no_grad()
def aligned(layer: MoELayer, groups: Tensor) -> Tensor:
    """[E, f]: for every expert the order in which its neurons are most like those of its group's own: the sum over matched neurons of the
    products of gate rows, up rows and down columns is largest (linear assignment). groups [E].
    """
    rows = [view for view in per_neuron(layer) if view.ndim == 3]
    found = torch.arange(layer.width).repeat(layer.num_experts, 1)
    for e, own in enumerate(groups.tolist()):
        if own != e:
            likeness = sum(view[own].float() @ view[e].float().T for view in rows)
            assert isinstance(likeness, Tensor)
            found[e] = torch.from_numpy(linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1])
    return found
