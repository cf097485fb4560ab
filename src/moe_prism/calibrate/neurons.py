"""How strongly each neuron answers the tokens its expert was chosen for: what criteria that remove neurons read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..model import MoELayer
from .base import Collector, Kept, RoutedBatch

PER_NEURON = ("E", "f")
PEAKS = ("max", "gated_max")


class Neurons(Collector):
    """Per neuron, over its expert's routed tokens, with a its activation before W_down and g the routing weight.

    sq Σa², gated_sq Σ(ga)², abs Σ|a| [E, f] (float64); max and gated_max: the largest |a| and |ga| [E, f] (float32). Per expert: count [E]
    (int64); per layer: tokens [1] (int64).
    """

    has_domains = True
    keeps: ClassVar[Mapping[str, Kept]] = {
        **dict.fromkeys(("sq", "gated_sq", "abs"), (PER_NEURON, torch.float64)),
        **dict.fromkeys(PEAKS, (PER_NEURON, torch.float32)),
        "count": (("E",), torch.int64),
        "tokens": ((1,), torch.int64),
    }

    def __init__(self, layer: MoELayer, *, capacity: int, seed: int) -> None:
        super().__init__(layer, capacity=capacity, seed=seed)
        self.values = zeros(self.keeps, layer)

    def update(self, batch: RoutedBatch) -> None:
        values = self.values
        for e, token, choice, a in each_activation(self.layer, batch):
            size = a.abs()
            gated = size * batch.weight[token, choice, None].float().abs()
            for name, found in (("sq", size.square()), ("gated_sq", gated.square()), ("abs", size)):
                values[name][e] += found.sum(0).cpu()
            for name, found in (("max", size), ("gated_max", gated)):
                values[name][e] = torch.maximum(values[name][e], found.amax(0).cpu())
            values["count"][e] += len(token)
        values["tokens"] += len(batch.x)

    def state(self) -> dict[str, Tensor]:
        return dict(self.values)

    def load(self, state: dict[str, Tensor]) -> None:
        self.values = {name: state[name].clone() for name in self.values}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add what another pass over other tokens found."""
        for name, mine in self.values.items():
            self.values[name] = torch.maximum(mine, state[name]) if name in PEAKS else mine + state[name]

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts * (layer.width * (3 * 8 + 2 * 4) + 8) + 8


def each_activation(layer: MoELayer, batch: RoutedBatch) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(expert, its tokens [S], their choices [S], its activations [S, f] float32) of every expert that was chosen."""
    for e in range(layer.num_experts):
        token, choice = torch.where(batch.index == e)
        if len(token):
            yield e, token, choice, layer.activations(e, batch.x[token]).float()


def zeros(keeps: Mapping[str, Kept], layer: MoELayer) -> dict[str, Tensor]:
    """Statistics of nothing yet, in the shapes that are kept."""
    sizes = {"E": layer.num_experts, "d": layer.hidden, "f": layer.width}
    return {
        name: torch.zeros([end if isinstance(end, int) else sizes[end] for end in shape], dtype=dtype)
        for name, (shape, dtype) in keeps.items()
    }
