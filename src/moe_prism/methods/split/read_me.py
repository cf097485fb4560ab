"""Read-ME's domain masks (arXiv 2410.19123), made into a partition; its router ahead of all layers is trained, ours is fitted."""

from __future__ import annotations

from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...compress.split import Deal
from ...errors import UsageError
from .base import DenseSeen, SplitMethod, by_strength, snake


class ReadMe(SplitMethod):
    """A domain's mask has the `density` strongest neurons on its text. What is in most masks always runs, the strongest first.

    In the paper a domain is one expert, masks overlap, and neurons of no mask are gone. Then experts cannot be added up to the dense
    layer. So here every neuron goes to one domain: the neuron that prefers a domain most chooses first, as long as the domain has room. A
    domain's neurons are dealt to its experts in snake order.
    """

    needs_domains: ClassVar[bool] = True

    def deal(self, seen: DenseSeen) -> Deal:
        names = list(seen.domains)
        if seen.experts % len(names):
            raise UsageError(
                f"{seen.experts} experts cannot be divided among {len(names)} domains",
                f"give a multiple of {len(names)} with --experts",
            )
        inside = self.masks(seen).sum(0)
        strength = seen.importance / seen.importance.max().clamp(min=1e-30)
        always = by_strength(inside + strength / 2)[: seen.shared]  # in most masks first, then the strongest
        shares = torch.stack([values / values.sum().clamp(min=1e-30) for values in seen.domains.values()])
        rest = torch.ones(seen.neurons, dtype=torch.bool)
        rest[always] = False
        homes = _homes(shares, rest)
        experts: list[Tensor] = []
        for number in range(len(names)):
            own = torch.where(homes == number)[0]
            experts += snake(own[by_strength(shares[number, own])], seen.experts // len(names))
        return Deal(always, tuple(experts))

    def facts(self, seen: DenseSeen) -> dict[str, Any]:
        """The largest and mean Jaccard index of two domains' masks, and neurons in all and in none."""
        masks = self.masks(seen)
        found = [float((a & b).sum() / (a | b).sum()) for a, b in combinations(masks, 2)]
        inside = masks.sum(0)
        return {
            "jaccard_mean": sum(found) / len(found),
            "jaccard_most": max(found),
            "in_all_masks": int((inside == len(masks)).sum()),
            "in_no_mask": int((inside == 0).sum()),
        }

    @staticmethod
    def masks(seen: DenseSeen) -> Tensor:
        """[domains, F] (bool)."""
        count = max(1, round(seen.density * seen.neurons))
        masks = torch.zeros(len(seen.domains), seen.neurons, dtype=torch.bool)
        for mask, values in zip(masks, seen.domains.values(), strict=True):
            mask[by_strength(values)[:count]] = True
        return masks


def _homes(shares: Tensor, rest: Tensor) -> Tensor:
    """[F]: the domain of every neuron in rest [F], as many to each; -1 elsewhere. shares [domains, F]: of a domain's activity."""
    room = [int(rest.sum()) // len(shares)] * len(shares)
    wishes = torch.argsort(shares, dim=0, descending=True, stable=True)  # of a neuron the domains, the best first
    top = shares.sort(0, descending=True).values
    margin = torch.where(rest, (top[0] - top[1]) / top.sum(0).clamp(min=1e-30), -1.0)
    homes = torch.full(rest.shape, -1)
    for neuron in by_strength(margin)[: int(rest.sum())].tolist():
        home = next(d for d in wishes[:, neuron].tolist() if room[d])
        homes[neuron], room[home] = home, room[home] - 1
    return homes
