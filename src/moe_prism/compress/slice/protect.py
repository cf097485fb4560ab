"""Neurons that every method leaves. Shared experts are no part of a layer's experts, so nothing of theirs ever goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import UsageError
from ...model import MoELayer
from ..prune import protections

Values = Sequence[Mapping[str, Mapping[str, Tensor]]]
"""Statistics of all layers: collector -> statistic -> tensor."""


def shields(layers: Sequence[MoELayer], values: Values, names: Sequence[str], pins: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[E, f] (bool) of every layer: what has to stay. names: of `protections`; pins: (layer, expert).

    UsageError for an expert that there is not.
    """
    whole = [torch.zeros(layer.num_experts, dtype=torch.bool) for layer in layers]
    for name in names:
        whole = [a | b for a, b in zip(whole, protections.get(name)(values), strict=True)]
    for number, expert in pins:
        if number >= len(layers) or expert >= layers[number].num_experts:
            raise UsageError(
                f"there is no expert {number}:{expert}",
                f"layers are 0 to {len(layers) - 1}, experts 0 to {layers[0].num_experts - 1}",
            )
        whole[number][expert] = True
    return [mask[:, None].expand(-1, layer.width).clone() for mask, layer in zip(whole, layers, strict=True)]
