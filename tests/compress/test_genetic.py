"""The search under several limits, against exact programs, all choices, and as many drawn at random."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moe_prism.compress.genetic import Genetic
from moe_prism.compress.quantize.allocate import cheapest
from moe_prism.errors import UsageError

WIDTHS = 1, 2, 3, 4, 6, 8


def problem(seed, genes, options, limits=2):
    """Losses that fall and sizes that rise with the option, both unevenly."""
    draw = np.random.default_rng(seed)
    losses = np.sort(draw.gamma(0.5, size=(genes, options)) * draw.gamma(1.0, size=(genes, 1)), 1)[:, ::-1]
    sizes = np.sort(draw.random((limits, genes, options)), 2)
    return np.ascontiguousarray(losses), sizes


def loss_of(losses, chosen):
    return float(losses[np.arange(len(losses)), chosen].sum())


@pytest.mark.parametrize("seed", range(6))
def test_small_cases_are_within_a_hundredth_of_the_best_of_all(seed):
    losses, sizes = problem(seed, 5, 4)
    limits = sizes.mean(2).sum(1) * 0.9
    best = np.inf
    for chosen in itertools.product(range(4), repeat=5):
        if (sizes[:, np.arange(5), chosen].sum(1) <= limits).all():
            best = min(best, loss_of(losses, chosen))
    found = Genetic().search(losses, sizes, limits.tolist())
    assert (sizes[:, np.arange(5), found].sum(1) <= limits * (1 + 1e-9)).all()
    assert loss_of(losses, found) <= 1.01 * best + 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_under_one_limit_it_is_within_a_hundredth_of_the_exact_program(seed):
    experts = 48
    losses, _ = problem(seed, experts, len(WIDTHS))
    bits = np.tile(np.array(WIDTHS, float), (1, experts, 1))
    total = round(2.5 * experts)
    exact = cheapest(torch.from_numpy(losses), WIDTHS, total)
    found = Genetic().search(losses, bits, [total])
    assert sum(WIDTHS[i] for i in found) <= total
    assert loss_of(losses, found) <= 1.01 * loss_of(losses, [WIDTHS.index(b) for b in exact]) + 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_it_beats_as_many_genomes_drawn_at_random(seed):
    losses, sizes = problem(seed, 24, 12)
    limits = sizes.mean(2).sum(1) * 0.8
    how = Genetic()
    draw = np.random.default_rng(seed)
    drawn = draw.integers(12, size=(how.population * (how.generations + 1), 24))
    fits = (sizes[:, np.arange(24), drawn].sum(2) <= limits[:, None]).all(0)
    at_random = losses[np.arange(24), drawn].sum(1)[fits]
    found = loss_of(losses, how.search(losses, sizes, limits.tolist()))
    assert not fits.any() or found < at_random.min()


def test_the_seed_decides_and_what_cannot_be_kept_is_refused():
    losses, sizes = problem(0, 8, 6)
    limits = (sizes.mean(2).sum(1) * 0.7).tolist()
    assert Genetic(seed=3).search(losses, sizes, limits) == Genetic(seed=3).search(losses, sizes, limits)
    with pytest.raises(UsageError, match="the smallest options take"):
        Genetic().search(losses, sizes, [limits[0], float(sizes[1].min(1).sum()) * 0.9])
