"""How strongly each neuron answers the tokens its expert was chosen for: what criteria that remove neurons read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..model import MoELayer
from .added_up import AddedUp
from .base import Kept, RoutedBatch

PER_NEURON = ("E", "f")
PEAKS = ("max", "gated_max")


class Neurons(AddedUp):
    """Per neuron, over its expert's routed tokens, with a its activation before W_down and g the routing weight.

    sq Σa², gated_sq Σ(ga)², abs Σ|a| [E, f] (float64); max and gated_max: the largest |a| and |ga| [E, f] (float32). Per expert: count [E]
    (int64); per layer: tokens [1] (int64).
    """

    has_domains = True
    peaks = PEAKS
    keeps: ClassVar[Mapping[str, Kept]] = {
        **dict.fromkeys(("sq", "gated_sq", "abs"), (PER_NEURON, torch.float64)),
        **dict.fromkeys(PEAKS, (PER_NEURON, torch.float32)),
        "count": (("E",), torch.int64),
        "tokens": ((1,), torch.int64),
    }

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

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts * (layer.width * (3 * 8 + 2 * 4) + 8) + 8


def each_activation(layer: MoELayer, batch: RoutedBatch) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(expert, its tokens [S], their choices [S], its activations [S, f] float32) of every expert that was chosen."""
    for e in range(layer.num_experts):
        token, choice = torch.where(batch.index == e)
        if len(token):
            yield e, token, choice, layer.activations(e, batch.x[token]).float()
