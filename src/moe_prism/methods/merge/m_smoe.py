"""M-SMoE: experts are merged into the most used ones that the router scores alike (arXiv 2310.01334)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compress.merge.change import MergeChange
from ...compress.merge.groups import MergedExperts, aligned, orders_bytes
from ...errors import UsageError
from ...model import MoELayer
from ...point import NamedPoint, OperatingPoint
from ..base import Method, Subject
from ..statistics import statistics_of

KEEPS = 0.75, 0.5
COLLECTORS = ("counts", "pairs")
GROUPINGS = ("scores", "random")


@dataclass(frozen=True, kw_only=True)
class MSmoeParameters:
    """keep: groups as a share of the experts, 0: .75 and .5. align: whether neurons are put in the order of the group's own expert first.
    groups: who joins whom, by router `scores` or at `random`, to compare with.
    """

    keep: float = 0
    align: bool = True
    groups: str = "scores"


class MSmoe(Method):
    """`m-smoe:0.5`. The experts that are used most stand for groups, by one threshold for all layers; the others join the one most like
    them. The router stays: merged experts are chosen as before, with the same weights behind them. Without the paper's training.
    """

    acts = "weights"
    needs = ("how often each expert is chosen", "router scores")
    paper = "arXiv 2310.01334"
    Parameters = MSmoeParameters
    parameters: MSmoeParameters

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> MSmoeParameters:
        found: MSmoeParameters = super().read_argument(name, text)
        if found.keep and not 0 < found.keep <= 1:
            raise UsageError(f"'{name}' keeps no share between 0 and 1", "write such as keep=0.75")
        if found.groups not in GROUPINGS:
            raise UsageError(f"'{name}' has no groups={found.groups}", f"choose one of: {', '.join(GROUPINGS)}")
        return found

    @classmethod
    def example(cls) -> str | None:
        return "0.5"

    def points(self, subject: Subject) -> Sequence[NamedPoint]:
        layers, asked = [layer.parts.layer for layer in subject.elastic.layers], self.parameters
        gathered = [own.values for own in statistics_of(subject, COLLECTORS).layers]
        more = [word for word, is_said in (("unaligned", not asked.align), (asked.groups, asked.groups != "scores")) if is_said]
        return [
            NamedPoint(
                name="-".join(["m-smoe", f"{keep:g}", *more]),
                point=OperatingPoint(weights=self.change(layers, gathered, keep).part()),
            )
            for keep in ((asked.keep,) if asked.keep else KEEPS)
        ]

    def change(self, layers: Sequence[MoELayer], values: Sequence[Mapping[str, Any]], keep: float) -> MergeChange:
        """What is merged, by the statistics of every layer."""
        counts = [own["counts"]["count"].double() for own in values]
        found = []
        for layer, count, own, stay in zip(layers, counts, values, dominant(counts, keep), strict=True):
            groups = self._groups(own["pairs"], stay, layer.index)
            orders = orders_bytes(aligned(layer, groups)) if self.parameters.align else b""
            weights = count + (count.sum() == 0)
            for members in (groups == g for g in torch.unique(groups)):  # a group that nobody chose: all alike
                weights[members] += weights[members].sum() == 0
            found.append(MergedExperts(layer.width, tuple(groups.tolist()), tuple(weights.tolist()), orders))
        return MergeChange(tuple(found))

    def _groups(self, pairs: Mapping[str, Tensor], stay: Tensor, layer: int) -> Tensor:
        """[E]: for every expert the one whose group it is in. stay [E] (bool)."""
        if self.parameters.groups == "random":
            likeness = torch.rand(len(stay), len(stay), generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
        else:
            if not int(pairs["scored_tokens"]):
                raise UsageError("the router's scores were not seen", "use m-smoe:groups=random, or another method")
            gram = pairs["score_gram"].double()
            size = gram.diagonal().clamp(min=1e-30).sqrt()
            likeness = gram / size[:, None] / size
        nearest = likeness.masked_fill(~stay, -torch.inf).argmax(1)
        return torch.where(stay, torch.arange(len(stay)), nearest)


def dominant(counts: Sequence[Tensor], keep: float) -> list[Tensor]:
    """[E] (bool) of every layer: the most used experts of all layers, by their share of a layer's choices; of each layer at least one."""
    shares = [count / count.sum().clamp(min=1) for count in counts]
    for own in shares:
        own[int(own.argmax())] = 1.0
    every = torch.cat(shares)
    stay = torch.zeros(len(every), dtype=torch.bool)
    stay[every.argsort(descending=True, stable=True)[: max(len(counts), round(keep * len(every)))]] = True
    return list(torch.split(stay, list(map(len, counts))))
