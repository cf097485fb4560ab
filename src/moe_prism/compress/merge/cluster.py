"""Which neurons of a layer become one: neurons of experts that go find the expert that has the most similar one, and are clustered there.

Shapes: E experts, f neurons each, n neurons that meet in one expert, D numbers that say how alike two neurons are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...model import MoELayer
from ..slice.mask import per_neuron

Seeds = Literal["gate", "own", "random"]
ROUNDS = 20
TOGETHER = 1 << 26
"""Similarities that are held at a time."""


@dataclass(frozen=True)
class Clustering:
    """threshold: cosine from which on a neuron moves, below it goes. seeds: which neurons the clusters begin with: those with the largest
    entry in their row of gate, the expert's own, or a draw. gate: whether rows of gate say how alike neurons are, beside up and down.
    """

    threshold: float = 0.5
    seeds: Seeds = "gate"
    gate: bool = False
    draw: int = 0


@torch.no_grad()
def homes(layer: MoELayer, kept: tuple[int, ...], weights: Tensor, how: Clustering) -> Tensor:
    """[E, f]: for every neuron the place, expert * f + neuron, of what it becomes a part of; -1: it goes. weights [E] count in clusters."""
    units, size = _units(layer, how.gate), layer.width
    found = torch.full((layer.num_experts, size), -1, dtype=torch.int64)
    owner = _owners(units, kept, how.threshold)
    sharpest = _sharpest(layer)
    for e in kept:
        gone, neuron = torch.where(owner == e)
        expert = torch.cat([torch.full((size,), e), gone])
        neuron = torch.cat([torch.arange(size), neuron])
        if not len(gone):
            found[e] = e * size + neuron
            continue
        points, first = units[expert, neuron], torch.arange(size)
        if how.seeds == "gate":
            first = sharpest[expert, neuron].argsort(descending=True, stable=True)[:size]
        elif how.seeds == "random":
            first = torch.randperm(len(points), generator=torch.Generator().manual_seed(how.draw * 1_000_003 + e))[:size]
        place = clusters(points, weights[expert].float(), first)
        found[expert, neuron] = e * size + _stable(place, first, size)
    return found


def clusters(points: Tensor, weights: Tensor, first: Tensor) -> Tensor:
    """[n]: the cluster of every point, spherical k-means from the points first [f]. points [n, D] of length 1, weights [n].

    A cluster that lost all its points begins again with the one that is represented worst.
    """
    centres = points[first].clone()
    place = torch.full((len(points),), -1, dtype=torch.int64)
    for _ in range(ROUNDS):
        best = (points @ centres.T).max(1)
        likeness, now = best.values, best.indices
        empty = torch.bincount(now, minlength=len(centres)) == 0
        for c in empty.nonzero().flatten().tolist():
            worst = int(likeness.argmin())
            centres[c] = points[worst]
            closer = points @ centres[c]
            moved = closer > likeness
            moved[worst] = True
            now[moved], likeness[moved] = c, closer[moved]
        if torch.equal(now, place):
            break
        place = now
        sums = torch.zeros_like(centres).index_add_(0, place, points * weights[:, None])
        there = sums.norm(dim=1) > 0
        centres[there] = nn.functional.normalize(sums[there], dim=1)
    for c in (torch.bincount(place, minlength=len(centres)) == 0).nonzero().flatten().tolist():  # whoever moved emptied another
        crowded = torch.bincount(place, minlength=len(centres))[place] > 1
        place[(points * centres[place]).sum(1).masked_fill(~crowded, torch.inf).argmin()] = c
    return place


def _stable(place: Tensor, first: Tensor, size: int) -> Tensor:
    """The same clusters, numbered so that one that began with a neuron of the expert itself lies where this neuron was."""
    number = torch.full((size,), -1, dtype=torch.int64)
    own = first < size
    number[own] = first[own]
    taken = torch.zeros(size, dtype=torch.bool)
    taken[first[own]] = True
    number[~own] = (~taken).nonzero().flatten()
    return number[place]


def _owners(units: Tensor, kept: tuple[int, ...], threshold: float) -> Tensor:
    """[E, f]: of every neuron of an expert that goes, the expert that has the most similar neuron; -1 below the threshold."""
    experts, size, _ = units.shape
    owner = torch.full((experts, size), -1, dtype=torch.int64)
    ids = torch.tensor(kept)
    several = max(1, TOGETHER // (size * size))
    for e in sorted({*range(experts)} - {*kept}):
        likeness, nearest = torch.full((size,), -torch.inf), torch.full((size,), -1, dtype=torch.int64)
        for part in torch.split(ids, several):
            best = (units[e] @ units[part].flatten(0, 1).T).max(1)
            better = best.values > likeness
            likeness[better], nearest[better] = best.values[better], part[best.indices[better] // size]
        owner[e] = torch.where(likeness >= threshold, nearest, -1)
    return owner


def _units(layer: MoELayer, gate: bool) -> Tensor:
    """[E, f, D] float32 of length 1."""
    parts = [layer.up, layer.down.transpose(1, 2), *([layer.gate] if gate and layer.gate is not None else [])]
    return nn.functional.normalize(torch.cat([part.detach().float().cpu() for part in parts], 2), dim=2)


def _sharpest(layer: MoELayer) -> Tensor:
    """[E, f]: the largest entry of every neuron's row of gate, or of up where there is none."""
    rows = per_neuron(layer)[0]
    return rows.float().abs().amax(2).cpu()
