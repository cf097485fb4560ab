"""Simulated annealing over swaps, as arXiv 2510.19366 section 4.1 describes it, compiled and seeded."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..errors import UsageError
from .base import Doubles, Floats, Ints, Partition, check_problem, result
from .greedy import greedy_owner
from .swaps import apply_swap, block_sums, relative, rival, swap_gain

START, DECAY = 100.0, 0.995  # temperature, and its factor after every swap
MARKS = 64  # places of the trace


def solve(mass: Floats, n_sub: int, dropped: int, seed: int = 0, *, steps: int = 100_000) -> Partition:
    """Greedy start, `steps` random swaps at a falling temperature; the best partition seen.

    Costs are the paper's (units of activation), so the temperature means something else for every expert, as it does there.
    """
    mass = check_problem(mass, n_sub, dropped)
    if steps < 1:
        raise UsageError(f"steps={steps}", "give at least 1")
    mass_t = np.ascontiguousarray(mass.T)
    owner = greedy_owner(mass, n_sub)
    block = mass.shape[1] // n_sub
    places = np.argsort(owner, kind="stable").reshape(n_sub, block)
    rng = np.random.default_rng(seed)
    g = rng.integers(n_sub, size=steps)
    moves = np.stack([g, (g + rng.integers(1, n_sub, size=steps)) % n_sub, *rng.integers(block, size=(2, steps))], 1)
    # Accepting with probability exp(gain / temperature) is accepting gains above temperature * log(coin).
    floor = START * DECAY ** np.arange(steps) * np.log(1 - rng.random(steps))
    best, marks = anneal(mass_t, owner, places, n_sub - dropped, moves.astype(np.int32), floor)
    first = float(np.partition(block_sums(mass_t, owner, n_sub), dropped - 1, axis=0)[:dropped].sum(dtype=np.float64))
    trace = [(0.0, first)] + [((i + 1) * steps / len(marks), first - gain) for i, gain in enumerate(marks)]
    return result(mass, best, n_sub, dropped, trace)


@njit(nogil=True, cache=True)
def anneal(mass_t: Floats, start: Ints, places: Ints, kept: int, moves: Ints, floor: Doubles) -> tuple[Ints, Doubles]:
    """Walk `moves` [steps, 4] = (group, group, place, place) over places [N, f / N], taking swaps that gain at least floor [steps].

    Returns the best owner [f], and the best gain so far at even distances.
    """
    marks = np.zeros(min(MARKS, moves.shape[0]))
    owner, best_owner = start.copy(), start.copy()
    norms = block_sums(mass_t, owner, places.shape[0])
    work = np.empty((kept + 5, mass_t.shape[1]), np.float32)
    now = best = 0.0
    steps = moves.shape[0]
    for s in range(steps):
        g, h, i, j = moves[s]
        a, b = places[g, i], places[h, j]
        rival(norms, g, h, kept, work[4:], work[3])
        relative(norms[g], norms[h], work[3], work[0], work[1], work[2])
        gain = swap_gain(work[0], work[1], work[2], mass_t[a], mass_t[b])
        if gain >= floor[s]:
            apply_swap(mass_t, owner, norms, a, b)
            places[g, i], places[h, j] = b, a
            now += gain
            if now > best:
                best = now
                best_owner[:] = owner
        marks[(s * marks.shape[0]) // steps] = best
    return best_owner, marks
