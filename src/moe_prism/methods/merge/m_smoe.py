"""M-SMoE: experts are merged into the most used ones that the router scores alike (arXiv 2310.01334)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compress.edit import Edit
from ...compress.merge.change import MergeChange
from ...compress.merge.groups import MergedExperts, aligned, orders_bytes
from ...errors import UsageError
from .base import MergeMethod, MergeParameters, RoutedLayer

GROUPINGS = ("scores", "random")


@dataclass(frozen=True, kw_only=True)
class MSmoeParameters(MergeParameters):
    """keep: groups as a share of the experts, 0: .75 and .5. align: whether neurons are put in the order of the group's own expert first.
    groups: who joins whom, by router `scores` or at `random`, to compare with.
    """

    align: bool = True
    groups: str = "scores"


class MSmoe(MergeMethod):
    """`m-smoe:0.5`. The experts that are used most stand for groups, by one threshold for all layers; the others join the one most like
    them. The router stays: merged experts are chosen as before, with the same weights behind them. Without the paper's training.
    """

    needs = ("how often each expert is chosen", "router scores")
    paper = "arXiv 2310.01334"
    Parameters = MSmoeParameters
    parameters: MSmoeParameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> MSmoeParameters:
        found: MSmoeParameters = super().read_argument(name, text)
        if found.groups not in GROUPINGS:
            raise UsageError(f"'{name}' has no groups={found.groups}", f"choose one of: {', '.join(GROUPINGS)}")
        return found

    @property
    def collectors(self) -> tuple[str, ...]:
        return ("counts", "pairs")

    def plans(
        self, layers: Sequence[RoutedLayer], keep: float, protected: Sequence[Tensor]
    ) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
        counts = [own.of("counts")["count"].double() for own in layers]
        found = []
        for own, count, stay, shield in zip(layers, counts, dominant(counts, keep, protected), protected, strict=True):
            groups = self._groups(own.of("pairs"), stay, shield, own.layer.index)
            found.append((groups, group_weights(count, groups), shield))
        return found

    def settled(self, plan: Any, layer: RoutedLayer) -> tuple[MergedExperts, Tensor]:
        groups, weights, shield = plan
        orders = orders_bytes(aligned(layer.layer, groups)) if self.parameters.align else b""
        return MergedExperts(layer.layer.width, tuple(groups.tolist()), tuple(weights.tolist()), orders), shield

    def edit(self, settled: Sequence[tuple[MergedExperts, Tensor]]) -> Edit:
        return MergeChange(tuple(own for own, _ in settled))

    def _groups(self, pairs: Mapping[str, Tensor], stay: Tensor, shield: Tensor, layer: int) -> Tensor:
        """[E]: for every expert the one whose group it is in. stay [E] (bool); shield [E] (bool): those that nobody joins."""
        if self.parameters.groups == "random":
            likeness = torch.rand(len(stay), len(stay), generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
        else:
            if not int(pairs["scored_tokens"]):
                raise UsageError("the router's scores were not seen", "use m-smoe:groups=random, or another method")
            gram = pairs["score_gram"].double()
            size = gram.diagonal().clamp(min=1e-30).sqrt()
            likeness = gram / size[:, None] / size
        nearest = likeness.masked_fill(~(stay & ~shield), -torch.inf).argmax(1)
        return torch.where(stay, torch.arange(len(stay)), nearest)


def group_weights(count: Tensor, groups: Tensor) -> Tensor:
    """[E]: what every expert counts in the mean of its group; all alike where nobody chose any of it."""
    weights = count + (count.sum() == 0)
    for members in (groups == g for g in torch.unique(groups)):
        weights[members] += weights[members].sum() == 0
    return weights


def dominant(counts: Sequence[Tensor], keep: float, protected: Sequence[Tensor] = ()) -> list[Tensor]:
    """[E] (bool) of every layer: the most used experts of all layers, by their share of a layer's choices. What is protected stays, and of
    each layer at least one that others may join. UsageError where these are more than would stay.
    """
    shields = protected or [torch.zeros(len(count), dtype=torch.bool) for count in counts]
    shares = [count / count.sum().clamp(min=1) for count in counts]
    for own, shield in zip(shares, shields, strict=True):
        if not shield.all():
            own[int(own.masked_fill(shield, -1.0).argmax())] = 1.0
        own[shield] = 2.0
    every = torch.cat(shares)
    wanted = max(len(counts), round(keep * len(every)))
    if int((every >= 1).sum()) > wanted:
        raise UsageError(f"{int((every >= 1).sum())} experts have to stay, {wanted} would", "keep more, or protect less")
    stay = torch.zeros(len(every), dtype=torch.bool)
    stay[every.argsort(descending=True, stable=True)[:wanted]] = True
    return list(torch.split(stay, list(map(len, counts))))
