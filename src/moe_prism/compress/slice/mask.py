"""Neurons that are not there: zeros in their rows of gate and up and in their column of down. Removing them is the same function.

Shapes: E experts, f neurons, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...model import MoELayer
from ..quantize.decoded import encodings_hold


def per_neuron(layer: MoELayer) -> list[Tensor]:
    """Views of all that belongs to single neurons, [E, f, d] or of a bias [E, f]; writing to them writes the model."""
    rows = (layer.gate, layer.up, layer.down.transpose(1, 2), layer.gate_bias, layer.up_bias)
    return [view.detach() for view in rows if view is not None]


@torch.no_grad()
def clear(layer: MoELayer, kept: Tensor) -> None:
    """Put zeros in the place of the neurons that do not stay. kept [E, f] (bool)."""
    gone = ~kept.to(layer.up.device)
    for view in per_neuron(layer):
        view[gone] = 0


@contextmanager
@torch.no_grad()
def sliced(model: Any, layers: Sequence[MoELayer], kept: Sequence[Tensor]) -> Iterator[None]:
    """Run a model without some neurons inside the block; the weights are as they were after it, to the bit. kept: [E, f] per layer.

    What goes is copied meanwhile, so memory grows by that share of the experts. Nothing gets faster: the zeros are multiplied.
    """
    gone = [~mask.to(layer.up.device) for layer, mask in zip(layers, kept, strict=True)]
    with encodings_hold(model, layers):
        saved = [[view[mask] for view in per_neuron(layer)] for layer, mask in zip(layers, gone, strict=True)]
        try:
            for layer, mask in zip(layers, kept, strict=True):
                clear(layer, mask)
            yield
        finally:
            for layer, mask, before in zip(layers, gone, saved, strict=True):
                for view, values in zip(per_neuron(layer), before, strict=True):
                    view[mask] = values
