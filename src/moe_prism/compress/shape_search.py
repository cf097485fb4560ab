"""Compressor (arXiv 2208.07120): the shape of a small model, by a genetic search for the most multiplications in so many bytes.

The paper's measure of a candidate is what it computes, and not its trained loss: more multiplications per token mean more capacity, and no
candidate is trained. Its operators are those of `genetic`. Where it looks for a dense encoder, this looks for a mixture of experts: layers,
hidden size, heads, experts, their width and how many a token takes.
"""

from __future__ import annotations

import numpy as np

from ..errors import UsageError
from ..schema.training import ShapeForm
from .genetic import Floats, Genetic, Genomes

LAYERS = (1, 2, 3, 4, 5, 6, 8, 12)
HIDDEN = (32, 48, 64, 80, 96, 112, 128, 160)
HEAD = (16, 32)
EXPERTS = (4, 8, 12, 16, 24, 32, 48, 64)
WIDTH = (16, 24, 32, 48, 64, 96, 128, 192)
ACTIVE = (1, 2, 3, 4, 6, 8)
GENES = (LAYERS, HIDDEN, HEAD, EXPERTS, WIDTH, ACTIVE)
SPARSEST = 4
"""A token takes at most this part of the experts: else all of them are the cheapest way to multiply, and it is no mixture."""


def shape_within(most_bytes: int, vocabulary: int, bytes_per_weight: int, *, context: int = 512, seed: int = 0) -> ShapeForm:
    """The shape with the most multiplications per token found whose weights take at most `most_bytes`.

    UsageError where the smallest shape takes more. Deterministic by the seed.
    """
    limit = most_bytes / bytes_per_weight

    def fitness(genomes: Genomes) -> Floats:
        sizes = _values(genomes)
        over = np.maximum(parameters(sizes, vocabulary) / limit - 1, 0)
        dense = np.maximum(sizes[:, 5] * SPARSEST / sizes[:, 3] - 1, 0)
        odd = (sizes[:, 1] % sizes[:, 2] != 0).astype(np.float64)
        worst: Floats = -multiplications(sizes, vocabulary, context) / 1e12 + over + dense + odd
        return worst

    smallest = _values(np.zeros((1, len(GENES)), np.int64))
    if float(parameters(smallest, vocabulary)[0]) > limit:
        need = int(parameters(smallest, vocabulary)[0]) * bytes_per_weight
        raise UsageError(f"the smallest model with {vocabulary:,} tokens takes {need:,} bytes, not {most_bytes:,}", "allow more")
    found = Genetic(generations=200, seed=seed).evolve(fitness, (len(GENES), max(map(len, GENES))))
    layers, hidden, head, experts, width, active = (int(size) for size in _values(found[None])[0])
    return ShapeForm(
        layers=layers, hidden=hidden, heads=hidden // head, experts=experts, width=width, active=active, context=context
    )


def parameters(sizes: Floats, vocabulary: int) -> Floats:
    """Of shapes [n, 6] as GENES orders them, for OLMoE's class: embedding, head, attention with its norms, router, experts."""
    layers, hidden, _, experts, width, _ = sizes.T
    layer = 4 * hidden**2 + 2 * hidden + 2 * hidden + experts * hidden + 3 * experts * hidden * width
    found: Floats = 2 * vocabulary * hidden + hidden + layers * layer
    return found


def multiplications(sizes: Floats, vocabulary: int, context: int) -> Floats:
    """Per token: matrices that it goes through, and attention to half of a context."""
    layers, hidden, _, experts, width, active = sizes.T
    layer = 4 * hidden**2 + experts * hidden + 3 * active * hidden * width + context * hidden
    found: Floats = vocabulary * hidden + layers * layer
    return found


def _values(genomes: Genomes) -> Floats:
    """Sizes [n, 6]; an option beyond the end of a gene stands for one from its beginning."""
    return np.stack([np.asarray(gene, np.float64)[genomes[:, i] % len(gene)] for i, gene in enumerate(GENES)], 1)
