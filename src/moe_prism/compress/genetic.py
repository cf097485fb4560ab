"""One option for every part of a model under several limits at once, by a genetic search: for what no exact program is at hand.

With one limit dynamic programming is exact (`quantize.allocate.cheapest`). With limits on memory and on what a token reads, its table has
a dimension for each. The operators are Compressor's (arXiv 2208.07120): crossover at one point or a mutation, no genome twice, the best
survive. The first genomes are not all drawn: some are the best at fixed prices of what the limits are on, which alone come close.

Shapes: G parts of the model (genes), O options of each, M limits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Floats = NDArray[np.float64]
Genomes = NDArray[np.int64]
TRIED = 1024
"""Combinations of prices, about."""
OVER = 1e6  # times what a limit is passed by, in the same units: a genome that fits is better than any that does not


@dataclass(frozen=True)
class Genetic:
    """population: genomes that survive; generations; crossover: share of the children that have two parents. Deterministic by the seed."""

    population: int = 50
    generations: int = 100
    crossover: float = 0.6
    seed: int = 0

    def search(self, losses: Floats, sizes: Floats, limits: Sequence[float]) -> list[int]:
        """The options [G] with the least sum of losses [G, O] found whose sums of sizes [M, G, O] keep the limits [M].

        UsageError where the smallest options of some size do not keep its limit, or none was found that keeps all.
        """
        most = np.asarray(limits, np.float64)
        least = sizes.min(2).sum(1)
        if (least > most * (1 + 1e-12)).any():
            worst = int((least / np.maximum(most, 1e-300)).argmax())
            raise UsageError(f"the smallest options take {least[worst] / most[worst]:.3g} of a limit", "ask for more")
        every = _Sums(losses, sizes, most)
        found = self.evolve(every.fitness, losses.shape, _priced(losses, sizes, most))
        if not every.fits(found):
            raise UsageError("no choice was found that keeps all limits", "ask for more of one of them")
        return [int(option) for option in found]

    def evolve(self, fitness: Callable[[Genomes], Floats], shape: tuple[int, ...], first: Genomes | None = None) -> Genomes:
        """The genome [G] of the least fitness found. fitness: of genomes [n, G] -> [n]; shape: (G, O); first: genomes to begin with."""
        draw = np.random.default_rng(self.seed)
        drawn = draw.integers(shape[1], size=(self.population, shape[0]))
        found = best(fitness, drawn if first is None else np.concatenate([first, drawn]), self.population)
        for _ in range(self.generations):
            found = best(fitness, np.concatenate([found, self._children(draw, found, shape[1])]), self.population)
        return np.asarray(found[0])

    def _children(self, draw: np.random.Generator, parents: Genomes, options: int) -> Genomes:
        """As many as survive: of two parents each, cut at one place, or of one with some genes drawn anew."""
        count, genes = self.population, parents.shape[1]
        first, second = (parents[draw.integers(len(parents), size=count)] for _ in range(2))
        cut = draw.integers(1, max(2, genes), size=(count, 1))
        crossed = np.where(np.arange(genes) < cut, first, second)
        anew = draw.random((count, genes)) < np.maximum(1.5 / genes, draw.random((count, 1)) ** 6)
        mutated = np.where(anew, draw.integers(options, size=(count, genes)), first)
        return np.where(draw.random((count, 1)) < self.crossover, crossed, mutated)


def best(fitness: Callable[[Genomes], Floats], genomes: Genomes, count: int) -> Genomes:
    """The best of them, none twice, best first; ties in their order as numbers."""
    own = np.unique(genomes, axis=0)
    return own[np.argsort(fitness(own), kind="stable")[:count]]


@dataclass(frozen=True)
class _Sums:
    losses: Floats
    sizes: Floats
    limits: Floats

    def fits(self, genome: Genomes) -> bool:
        return bool(self._over(genome[None])[0] == 0)

    def fitness(self, genomes: Genomes) -> Floats:
        loss: Floats = self.losses[np.arange(genomes.shape[1]), genomes].sum(1)
        scale = max(float(self.losses.max()), 1e-300)
        return loss + OVER * scale * self._over(genomes)

    def _over(self, genomes: Genomes) -> Floats:
        """[n]: what limits are passed by, as a share of them."""
        taken: Floats = self.sizes[:, np.arange(genomes.shape[1]), genomes].sum(2)
        over: Floats = np.maximum(taken / np.maximum(self.limits, 1e-300)[:, None] - 1 - 1e-12, 0).sum(0)
        return over


def _priced(losses: Floats, sizes: Floats, limits: Floats) -> Genomes:
    """The best genome at every combination of prices."""
    unit = max(float(losses.max(1).sum()), 1e-300) / np.maximum(
        limits, 1e-300
    )  # what a whole limit is worth where all is lost without it
    steps = max(2, round(TRIED ** (1 / len(limits))))
    found = []
    for prices in itertools.product((0.0, *np.geomspace(1e-4, 1e2, steps).tolist()), repeat=len(limits)):
        priced = losses + np.tensordot(np.asarray(prices) * unit, sizes, 1)
        found.append(priced.argmin(1))
    return np.stack(found)
