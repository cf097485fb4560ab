"""k-means of experts that are known by how alike two of them are only. Shapes: E experts, C clusters."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS, STARTS = 50, 8


def k_means(likeness: Tensor, count: int, seed: int) -> tuple[Tensor, float]:
    """([E]: cluster of every expert, numbered from 0; the sum of squared distances to the centres), the best of STARTS.

    likeness [E, E] (float64): inner products of the experts, in whatever space. Seeds are drawn as k-means++ does.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [_from(likeness, _seeds(likeness, count, generator)) for _ in range(1 if count in (1, len(likeness)) else STARTS)]
    return min(found, key=lambda one: one[1])


def _seeds(likeness: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[C]: experts that clusters begin with, each far from those before it."""
    size = likeness.diagonal()
    chosen = [int(torch.randint(len(size), (), generator=generator))]
    far = _apart(likeness, chosen[0])
    while len(chosen) < count:
        left = far.clone()
        left[chosen] = 0.0
        if float(left.sum()) <= 0:  # all others are copies of a seed
            left = torch.ones_like(far)
            left[chosen] = 0.0
        chosen.append(int(torch.multinomial(left, 1, generator=generator)))
        far = torch.minimum(far, _apart(likeness, chosen[-1]))
    return torch.tensor(chosen)


def _apart(likeness: Tensor, expert: int) -> Tensor:
    """[E]: squared distances to one of them."""
    size = likeness.diagonal()
    return (size + size[expert] - 2 * likeness[expert]).clamp(min=0)


def _from(likeness: Tensor, seeds: Tensor) -> tuple[Tensor, float]:
    count = len(seeds)
    cluster = torch.stack([_apart(likeness, int(seed)) for seed in seeds]).argmin(0)
    cluster[seeds] = torch.arange(count)
    for _ in range(ROUNDS):
        distance = _distances(likeness, cluster, count)
        now = distance.argmin(1)
        for c in (torch.bincount(now, minlength=count) == 0).nonzero().flatten().tolist():
            crowded = torch.bincount(now, minlength=count)[now] > 1
            own = distance.gather(1, now[:, None])[:, 0].masked_fill(~crowded, -1.0)
            now[own.argmax()] = c
        if torch.equal(now, cluster):
            break
        cluster = now
    return cluster, float(_distances(likeness, cluster, count).gather(1, cluster[:, None]).clamp(min=0).sum())


def _distances(likeness: Tensor, cluster: Tensor, count: int) -> Tensor:
    """[E, C]: squared distances to the centres of clusters, of which none is empty."""
    member = torch.nn.functional.one_hot(cluster, count).to(likeness)
    share = member / member.sum(0)
    to = likeness @ share
    return likeness.diagonal()[:, None] - 2 * to + (share * to).sum(0)
