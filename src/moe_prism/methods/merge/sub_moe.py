"""Sub-MoE: experts whose outputs are alike become one (arXiv 2506.23266), from its description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...compress.edit import Edit
from ...compress.merge.change import MergeChange
from ...compress.merge.groups import MergedExperts, aligned, orders_bytes
from ...compress.merge.kernel import k_means
from ...compress.merge.subspace import SubspaceChange
from ...errors import UsageError
from ...model import MoELayer
from .base import MergeMethod, MergeParameters, RoutedLayer
from .m_smoe import group_weights

BY = ("outputs", "scores", "random")
SHIFTS = 8
"""Ways to deal clusters to the layers that are clustered together, to each side."""


@dataclass(frozen=True, kw_only=True)
class SubMoeParameters(MergeParameters):
    """clusters: who is like whom, by `outputs`, by router `scores` or at `random`, the last two to compare with. joint: neighbouring layers
    that share their number of clusters. align: whether neurons are put in one order first. thin: bytes of a merged expert as a share of a
    whole one's, in two thin matrices; 0: it stays whole. white: whether channels count by how large they are, where it is thin.
    """

    clusters: str = "outputs"
    joint: int = 2
    align: bool = True
    thin: float = 0
    white: bool = True


class _Plan(NamedTuple):
    groups: Tensor
    weights: Tensor
    scale: tuple[float, ...]
    whole: tuple[int, ...]


class SubMoe(MergeMethod):
    """k-means by the mean cosine of two experts' outputs for the same tokens. A group becomes the mean by use; the router stays.

    The paper merges in a joint singular space. Untruncated that is the mean, whatever the space is. Truncated (`thin=0.5`) a group keeps
    the directions in which all of its experts together are largest.
    """

    needs = ("outputs of all experts for a sample of tokens", "how often each expert is chosen")
    paper = "arXiv 2506.23266"
    Parameters = SubMoeParameters
    parameters: SubMoeParameters
    capacity = 1024

    @classmethod
    def read_argument(cls, name: str, text: str | None) -> SubMoeParameters:
        found: SubMoeParameters = super().read_argument(name, text)
        if found.clusters not in BY:
            raise UsageError(f"'{name}' has no clusters={found.clusters}", f"choose one of: {', '.join(BY)}")
        if not 0 <= found.thin < 1:
            raise UsageError(f"thin={found.thin:g} of '{name}' is no share of bytes", "write thin=0.5")
        if found.joint < 1:
            raise UsageError(f"'{name}' clusters no layers together", "write joint=2, as published")
        return found

    @property
    def collectors(self) -> tuple[str, ...]:
        asked = self.parameters
        by = {"outputs": ("grams",), "scores": ("pairs",), "random": ()}[asked.clusters]
        return ("counts", *by, *(("inputs",) if asked.thin and asked.white else ()))

    def check(self, layers: Sequence[RoutedLayer], keep: float) -> None:
        if self.parameters.thin:
            _rank([own.layer for own in layers], self.parameters.thin)

    def plans(self, layers: Sequence[RoutedLayer], keep: float, protected: Sequence[Tensor]) -> Sequence[_Plan]:
        every = [self._likeness(own) for own in layers]
        found: list[_Plan] = []
        for first in range(0, len(layers), self.parameters.joint):
            part = slice(first, first + self.parameters.joint)
            clustered = self._clustered(every[part], protected[part], keep)
            for own, labels, shield in zip(layers[part], clustered, protected[part], strict=True):
                count = own.of("counts")["count"].double()
                groups = torch.zeros_like(labels)
                for label in torch.unique(labels):  # the most used member stands for the group
                    groups[labels == label] = int(torch.where(labels == label, count, -1.0).argmax())
                found.append(
                    _Plan(groups, group_weights(count, groups), self._scale(own), tuple(shield.nonzero().flatten().tolist()))
                )
        return found

    def _clustered(self, likeness: Sequence[Tensor], protected: Sequence[Tensor], keep: float) -> list[Tensor]:
        """[E] of every layer: the number of its group. Layers share one number of clusters, dealt so that most is alike."""
        free = [(~shield).nonzero().flatten() for shield in protected]
        inner = [own[ids][:, ids] for own, ids in zip(likeness, free, strict=True)]
        sizes = [len(ids) for ids in free]
        wanted = [round(keep * len(own)) - (len(own) - n) for own, n in zip(likeness, sizes, strict=True)]
        if min(wanted) < min(1, *sizes):
            raise UsageError("more experts are protected than would stay", "keep more, or protect less")
        best: tuple[float, list[Tensor]] | None = None
        for counts in _deals(wanted, sizes):
            found = [
                k_means(own, n, seed) if n else (own[:0, 0].long(), 0.0)
                for seed, (own, n) in enumerate(zip(inner, counts, strict=True))
            ]
            total = sum(lost for _, lost in found)
            if best is None or total < best[0] - 1e-12:
                best = total, [labels for labels, _ in found]
        assert best is not None
        groups = []
        for ids, labels, own in zip(free, best[1], likeness, strict=True):
            groups.append(torch.arange(len(own)) + len(own))
            groups[-1][ids] = labels
        return groups

    def _likeness(self, own: RoutedLayer) -> Tensor:
        """[E, E] (float64), 1 on the diagonal."""
        experts = own.layer.num_experts
        if self.parameters.clusters == "random":
            draw = torch.randn(experts, 8, generator=torch.Generator().manual_seed(own.layer.index), dtype=torch.float64)
            gram = draw @ draw.T
        elif self.parameters.clusters == "scores":
            gram = own.of("pairs")["score_gram"].double()
        else:
            each = own.of("grams")["gram"].double()
            if not len(each):
                raise UsageError("the router's scores were not seen", "write clusters=random, or use another method")
            size = each.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt()
            return (each / size[:, :, None] / size[:, None]).mean(0)
        size = gram.diagonal().clamp(min=1e-30).sqrt()
        return gram / size[:, None] / size

    def _scale(self, own: RoutedLayer) -> tuple[float, ...]:
        """[d]: the root mean square of every channel over all choices."""
        if not (self.parameters.thin and self.parameters.white):
            return ()
        found = own.of("inputs")
        size = (found["sq"].sum(0) / found["count"].sum().clamp(min=1)).sqrt()
        return tuple(size.clamp(min=1e-6 * max(float(size.max()), 1e-30)).tolist())

    def settled(self, plan: Any, layer: RoutedLayer) -> tuple[MergedExperts, MoELayer, _Plan]:
        orders = orders_bytes(aligned(layer.layer, plan.groups)) if self.parameters.align else b""
        merged = MergedExperts(layer.layer.width, tuple(plan.groups.tolist()), tuple(plan.weights.tolist()), orders)
        return merged, layer.layer, plan

    def edit(self, settled: Sequence[tuple[MergedExperts, MoELayer, _Plan]]) -> Edit:
        merged = MergeChange(tuple(own for own, _, _ in settled))
        if not self.parameters.thin:
            return merged
        layers, plans = [layer for _, layer, _ in settled], [plan for _, _, plan in settled]
        scales = tuple(plan.scale for plan in plans) if self.parameters.white else ()
        whole = tuple(plan.whole for plan in plans) if any(plan.whole for plan in plans) else ()
        return SubspaceChange(merged, layers[0].hidden, _rank(layers, self.parameters.thin), scales, whole)


def _rank(layers: Sequence[MoELayer], thin: float) -> int:
    """The rank that a share of the bytes pays for. UsageError where it pays for none, or layers differ."""
    if len({(layer.hidden, layer.width) for layer in layers}) > 1:
        raise UsageError("experts differ in width, by layers", "leave thin out")
    d, f = layers[0].hidden, layers[0].width
    rank = min(round(thin * d * f / (d + f)), d, f)
    if rank < 1:
        raise UsageError(f"thin={thin:g} leaves no rank", "give more")
    return rank


def _deals(wanted: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of clusters for every layer, as many in all: as wanted, then with some moved from one layer to another."""
    step = max(1, max(sizes) // (4 * SHIFTS))
    found = [list(wanted)]
    for a in range(len(wanted)):
        for b in range(len(wanted)):
            for shift in range(step, step * SHIFTS + 1, step):
                deal = list(wanted)
                deal[a] += shift
                deal[b] -= shift
                if a != b and deal[b] >= 1 and deal[a] <= sizes[a]:
                    found.append(deal)
    return found
