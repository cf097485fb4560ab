"""Watch what a model's routers do, without changing what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ..model.base import ExpertsFn, is_expert
from ..routing import Routed
from ..routing.base import SkipStage
from .host import Host
from .layer import ElasticLayer

PROBE_TOKENS = 16
CONSTANT = 1e-2  # relative spread of a token's sum of weights up to which the router normalises them; wide enough for bfloat16


RankBy = Callable[[Routed], Tensor]
"""A number [T, k] for every expert that the router chose; see `SkipStage.rank_by`."""
View = Callable[[Routed], Tensor]
"""What is looked at of a batch: [T, ...]."""


def _observer(layer: ElasticLayer, view: View, found: list[Tensor]) -> ExpertsFn:
    def run(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        found.append(view(layer.routed(x, index, weight, {})).detach().cpu())
        return layer(x, index, weight)

    return run


@contextmanager
def viewed(elastic: Host, view: View) -> Iterator[list[list[Tensor]]]:
    """Record a view [T, ...] of the router's choice, in every layer of what runs inside the block."""
    found: list[list[Tensor]] = [[] for _ in elastic.layers]
    try:
        for layer, rows in zip(elastic.layers, found, strict=True):
            layer.parts.layer.install(_observer(layer, view, rows))
        yield found
    finally:
        for layer in elastic.layers:
            layer.parts.layer.install(layer)


def recorded(elastic: Host, rank_by: RankBy = SkipStage.rank_by) -> AbstractContextManager[list[list[Tensor]]]:
    """Record what experts are ranked by [T, k], in every layer of what runs inside the block; -1 where there is no expert.

    By default that is the |routing weight|.
    """
    return viewed(elastic, lambda routed: rank_by(routed).masked_fill(~is_expert(routed.index, routed.experts), -1.0))


def ranked(weights: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What `recorded` found as [S, k] per layer, largest first."""
    return [torch.cat(list(rows)).sort(dim=1, descending=True, stable=True).values for rows in weights]


@torch.no_grad()
def normalises(elastic: Host) -> bool:
    """Whether the router scales the weights of its choice to a constant sum: such a model, run with fewer experts, would do so again.

    Asked of the model itself, on a few arbitrary tokens: configurations name it in many ways, or not at all.
    """
    size = elastic.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(elastic.model.device)
    with recorded(elastic) as weights:
        elastic.model(input_ids=ids, use_cache=False)
    sums = [torch.cat(rows).clamp(min=0).sum(1) for rows in weights]
    return all(bool((s.max() - s.min()) <= CONSTANT * s.max()) for s in sums)
