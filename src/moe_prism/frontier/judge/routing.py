"""Routing agreement: whether routers, fed by a changed model, still choose the full model's experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...elastic.layer import ElasticLayer
from ...model.base import is_expert
from .base import Material, NoQuestionsError, Slice, batches, spread

TOKENS = 8_192


class RoutingAgreement(Slice):
    """For every token of held-out windows the Jaccard index of the experts that a router chooses and that it chooses in the full model.

    Mean over layers. What a stage or a rule drops afterwards does not count: only what reaches the router has changed. A group is a window.
    """

    name = "routing"
    is_ability = False

    def __init__(self, material: Material) -> None:
        layers = [layer for layer in material.elastic.layers if layer.parts.layer.num_experts > 1]
        if not layers:
            raise NoQuestionsError("the model has no routers")
        self.layers = layers
        self.rows = torch.stack(spread(list(material.ids), max(1, TOKENS // material.ids.shape[1])))
        self.groups = torch.arange(len(self.rows)).repeat_interleave(self.rows.shape[1])
        self.full: list[list[Tensor]] = []
        self.full = [list(found) for found in self._chosen(material.model)]

    def verdicts(self, model: Any) -> Tensor:
        found = []
        for full, own in zip(self.full, self._chosen(model), strict=True):
            found.append(torch.stack([jaccard(a, b) for a, b in zip(full, own, strict=True)]).mean(0))
        return torch.cat(found)

    def _chosen(self, model: Any) -> Iterator[list[Tensor]]:
        """Of every batch a [T, E] (bool) per layer."""
        for rows in batches(self.rows):
            seen: dict[int, Tensor] = {}
            with ExitStack() as stack:
                for layer in self.layers:
                    stack.enter_context(_watched(layer, seen))
                model(input_ids=rows.to(model.device), use_cache=False)
            yield [seen[layer.index] for layer in self.layers]


@contextmanager
def _watched(layer: ElasticLayer, seen: dict[int, Tensor]) -> Iterator[None]:
    """Note which experts the router chooses of each token, on their way to the layer."""
    inner, experts = layer.parts.layer, layer.parts.layer.num_experts

    def observe(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        real = is_expert(index, experts)
        marks = torch.zeros(len(index), experts + 1, dtype=torch.bool)
        seen[layer.index] = marks.scatter_(1, index.masked_fill(~real, experts).cpu(), True)[:, :experts]
        return layer(x, index, weight)

    inner.uninstall()
    inner.install(observe)
    try:
        yield
    finally:
        inner.uninstall()
        inner.install(layer)


def jaccard(one: Tensor, other: Tensor) -> Tensor:
    """[T] (float64) of sets [T, E] (bool); two empty sets agree."""
    both, either = (one & other).sum(1).double(), (one | other).sum(1).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)
