"""What the loss would lose without a neuron, to first and second order: from one backward pass through the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..model import MoELayer
from .added_up import AddedUp
from .base import Kept, RoutedBatch
from .neurons import PER_NEURON, each_activation

SUMS = ("slope_sq", "product_sq", "product", "product_abs")
SLOPE = "slope"
"""What the backward pass adds to a batch, see `RoutedBatch`."""


class Gradients(AddedUp):
    """Per neuron, over its expert's routed tokens, with a its activation and L the loss of a window (sum over its next tokens).

    slope_sq Σ(∂L/∂a)², product_sq Σ(a ∂L/∂a)², product Σ a ∂L/∂a, product_abs Σ|a ∂L/∂a| [E, f] (float64). count [E], tokens [1] (int64).
    ∂L/∂a is g W_downᵀ ∂L/∂y with y the layer's output and g the routing weight: no weight needs a gradient.
    """

    needs: ClassVar[frozenset[str]] = frozenset({SLOPE})
    has_domains = True
    keeps: ClassVar[Mapping[str, Kept]] = {
        **dict.fromkeys(SUMS, (PER_NEURON, torch.float64)),
        "count": (("E",), torch.int64),
        "tokens": ((1,), torch.int64),
    }

    def update(self, batch: RoutedBatch) -> None:
        assert batch.slope is not None
        for e, token, choice, a in each_activation(self.layer, batch):
            slope = batch.slope[token].float() @ self.layer.down[e].float() * batch.weight[token, choice, None].float()
            product = a * slope
            for name, found in zip(SUMS, (slope.square(), product.square(), product, product.abs()), strict=True):
                self.values[name][e] += found.sum(0).cpu()
            self.values["count"][e] += len(token)
        self.values["tokens"] += len(batch.x)

    @staticmethod
    def bytes_per_layer(layer: MoELayer, capacity: int) -> int:
        return layer.num_experts * (layer.width * len(SUMS) * 8 + 8) + 8


@contextmanager
def slopes_flow(model: Any) -> Iterator[None]:
    """Inside the block gradients reach every layer from the embeddings on, and no weight gets one. The model is as it was after it."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _given, out: out.detach().requires_grad_())
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    """The sum over next tokens of windows ids [n, length]; a window's part of it does not depend on the others."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
