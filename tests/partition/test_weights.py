import math

import numpy as np
import pytest

from moe_prism.errors import CorruptError, UsageError
from moe_prism.partition.weights import weight_fallback


def clustered(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(4), 6))
    gate, up = (rng.standard_normal((4, 32))[owner] + 0.1 * rng.standard_normal((24, 32)) for _ in range(2))
    return gate.astype(np.float32), up.astype(np.float32), owner


def test_neurons_with_like_weights_share_a_block() -> None:
    gate, up, owner = clustered(0)
    found = min((weight_fallback(gate, up, 4, seed) for seed in range(4)), key=lambda p: mixed(owner, p.perm))
    assert mixed(owner, found.perm) == 0
    assert math.isnan(found.cost)


def mixed(owner: np.ndarray, perm: np.ndarray) -> int:
    return sum(len(set(owner[block])) - 1 for block in np.split(perm, 4))


def test_permutation_and_seed() -> None:
    gate, up, _ = clustered(1)
    for rows in (gate, None):
        found = weight_fallback(rows, up, 4, 7)
        assert found.perm.dtype == np.int32
        assert sorted(found.perm) == list(range(24))
        assert np.array_equal(found.perm, weight_fallback(rows, up, 4, 7).perm)
    assert sorted(weight_fallback(np.zeros((8, 3)), np.zeros((8, 3)), 2).perm) == list(range(8))


def test_bad_input_is_refused() -> None:
    gate, up, _ = clustered(2)
    with pytest.raises(UsageError):
        weight_fallback(gate, up, 5)
    with pytest.raises(UsageError):
        weight_fallback(gate[:4], up, 4)
    gate[0, 0] = np.nan
    with pytest.raises(CorruptError):
        weight_fallback(gate, up, 4)
