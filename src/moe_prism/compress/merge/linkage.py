"""Clusters in which every two experts are close: complete linkage. Shapes: E experts, L layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

FAR = 1e6
"""Between experts that shall not meet, in mean distances of a layer."""


def one_threshold(distances: Sequence[Tensor], wanted: int, least: Sequence[int]) -> list[int]:
    """Clusters of every layer, `wanted` in all, under one threshold for the distances in all layers, of each layer at least so many.

    Two clusters join as long as the largest distance between their members is below the threshold. distances [E, E] of every layer.
    """
    heights = [sorted(_tree(own)[:, 2].tolist()) for own in distances]
    room = [heights[layer][: len(own) - least[layer]] for layer, own in enumerate(distances)]
    joins = sorted((h, layer) for layer, own in enumerate(room) for h in own)[: sum(map(len, distances)) - wanted]
    counts = [len(own) for own in distances]
    for _, layer in joins:
        counts[layer] -= 1
    return counts


def complete_linkage(distances: Tensor, count: int) -> Tensor:
    """[E]: the number of every expert's cluster, from 0; `count` of them."""
    if count == len(distances):
        return torch.arange(count)
    labels = fcluster(_tree(distances), count, "maxclust")
    if len(set(labels.tolist())) != count:  # joins at one height: as many of them as are wanted
        labels = fcluster(_tree(distances, ties=True), count, "maxclust")
    found: Tensor = torch.unique(torch.from_numpy(labels), return_inverse=True)[1]
    return found


def _tree(distances: Tensor, ties: bool = False) -> np.ndarray:
    own = distances.double().numpy().copy()
    if ties:
        order = np.arange(own.size, dtype=np.float64).reshape(own.shape)
        own += 1e-9 * max(1.0, float(np.abs(own).max())) * (order + order.T) / own.size
    own -= own.min()
    np.fill_diagonal(own, 0.0)
    tree: np.ndarray = linkage(squareform(own, checks=False), "complete")
    return tree
