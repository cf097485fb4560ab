"""The compiled kernels against recomputation."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moe_prism.partition.alt import alternate, kept_mass
from moe_prism.partition.assign import balance
from moe_prism.partition.random_ import random_owner
from moe_prism.partition.swaps import apply_swap, block_sums, polish, relative, rival, swap_gain


def problem(seed: int, n_sub: int, tokens: int = 50, block: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mass_t = np.exp(rng.standard_normal((n_sub * block, tokens))).astype(np.float32)
    owner = random_owner(n_sub * block, n_sub, rng)
    return mass_t, owner, block_sums(mass_t, owner, n_sub)


def full(mass_t: np.ndarray, owner: np.ndarray, kept: int) -> float:
    n_sub = owner.max() + 1
    norms = np.stack([mass_t[owner == n].sum(0, dtype=np.float64) for n in range(n_sub)])
    return float(np.sort(norms, 0)[n_sub - kept :].sum())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n_sub=st.integers(2, 7), data=st.data())
def test_swap_price_equals_recomputation(seed: int, n_sub: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, n_sub - 1))
    mass_t, owner, norms = problem(seed, n_sub)
    g, h = data.draw(st.permutations(range(n_sub)))[:2]
    out, into = int(np.flatnonzero(owner == g)[0]), int(np.flatnonzero(owner == h)[-1])
    ra, rb, ru, u = np.empty((4, mass_t.shape[1]), np.float32)
    rival(norms, g, h, kept, np.empty((kept + 1, mass_t.shape[1]), np.float32), u)
    relative(norms[g], norms[h], u, ra, rb, ru)
    gain = swap_gain(ra, rb, ru, mass_t[out], mass_t[into])
    before = full(mass_t, owner, kept)
    apply_swap(mass_t, owner, norms, out, into)
    assert (owner[out], owner[into]) == (h, g)
    assert abs(full(mass_t, owner, kept) - before - gain) < 1e-5 * before
    assert np.allclose(norms, block_sums(mass_t, owner, n_sub), rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n_sub=st.integers(2, 6), data=st.data())
def test_descents_never_lose_and_report_what_they_gain(seed: int, n_sub: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, n_sub - 1))
    mass_t, owner, norms = problem(seed, n_sub)
    first = full(mass_t, owner, kept)
    norms = alternate(mass_t, owner, n_sub, kept)
    middle = full(mass_t, owner, kept)
    gain = polish(mass_t, owner, norms, kept, 1e-7 * first, np.ones((n_sub, n_sub), np.bool_))
    last = full(mass_t, owner, kept)
    assert middle >= first * (1 - 1e-6)
    assert abs(last - middle - gain) < 1e-5 * last
    assert np.bincount(owner).tolist() == [3] * n_sub
    assert abs(kept_mass(norms, kept) - last) < 1e-5 * last


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), n_sub=st.integers(2, 9), block=st.integers(1, 12), skew=st.sampled_from([0.0, 3.0]))
def test_balance_is_the_optimal_assignment(seed: int, n_sub: int, block: int, skew: float) -> None:
    rng = np.random.default_rng(seed)
    gain = rng.standard_normal((n_sub * block, n_sub)) + skew * np.arange(n_sub)
    owner = balance(gain)
    assert np.bincount(owner, minlength=n_sub).tolist() == [block] * n_sub
    rows, columns = linear_sum_assignment(np.repeat(gain, block, 1), maximize=True)
    assert np.isclose(gain[np.arange(owner.size), owner].sum(), np.repeat(gain, block, 1)[rows, columns].sum())


def test_balance_of_equal_gains_terminates() -> None:
    assert np.bincount(balance(np.zeros((12, 4)))).tolist() == [3] * 4
