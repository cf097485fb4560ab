"""Reading ahead: what the next layer will want, guessed from this layer's input while this layer runs.

The guess is the next layer's own selection on this layer's input: its router (the cross-layer gate of Fate, arXiv 2502.12224, training-
free), then its predictor and rule, so that sub-experts are guessed and not only experts. Shapes: T tokens, E experts, k, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...elastic.runtime import _per_token, experts_per_token
from ..base import Key
from ..record import router_weight

if TYPE_CHECKING:
    from .layer import StoredElastic

FEW = 8  # tokens up to which there is something to gain: a long prompt wants nearly everything


class Ahead:
    """Guesses for every layer but the first. width: records to read ahead at most; 0 = never."""

    def __init__(self, elastic: StoredElastic, width: int) -> None:
        self.elastic, self.width = elastic, width
        self.k = experts_per_token(elastic.model, elastic.stored[0].plan.layer)
        layers = [layer.plan.layer for layer in elastic.stored] if width else []
        self.routers = [router_weight(elastic.model, layer) for layer in layers]

    def __call__(self, number: int, x: Tensor) -> None:
        """Begin to read for layer `number`, from the input x [T, d] of the layer before."""
        if self.width and number < len(self.routers) and len(x) <= FEW:
            self.elastic.store.prefetch(number, self.keys(number, x))

    def keys(self, number: int, x: Tensor) -> Sequence[Key]:
        """The records layer `number` would keep on this input, best first, at most `width`."""
        layer = self.elastic.stored[number]
        weight, index = (x @ self.routers[number].T).float().softmax(-1).topk(self.k, -1)
        setting, misses, space = self.elastic.setting, self.elastic.misses, self.elastic.store.space
        valid = torch.ones_like(index, dtype=torch.bool)
        if (setting.is_full(number) and misses.is_exact) or space.parts == 1:
            values = weight[:, :, None].expand(-1, -1, space.parts)
            keep = torch.ones_like(values, dtype=torch.bool)
        else:
            slots = layer.slots(x, index, weight, valid, setting)
            budget = _per_token(setting.at(number), x).clamp(max=misses.floor)  # what is kept only where it is there is not read
            values, keep = slots.values(), layer.rule(setting.rule).keep(slots, budget)
        first = space.of_layer(number).start
        number_of = first + index[:, :, None] * space.parts + torch.arange(space.parts)
        order = values[keep].argsort(descending=True)
        return list(dict.fromkeys(number_of[keep][order].tolist()))[: self.width]
