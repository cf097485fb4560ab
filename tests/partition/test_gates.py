import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import CorruptError, UsageError
from moe_prism.partition import gates, order_gates
from moe_prism.partition.gates import centrality, centrality_expert, energy


def random_mass(seed: int, tokens: int = 30, width: int = 24) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).standard_normal((tokens, width))).astype(np.float32)


@pytest.mark.parametrize("name", gates.names())
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), n_sub=st.sampled_from([2, 4, 6]), r=st.integers(0, 4))
def test_blocks_keep_their_neurons_and_gates_come_first(name: str, seed: int, n_sub: int, r: int) -> None:
    rng = np.random.default_rng(seed)
    mass, perm, down = random_mass(seed), rng.permutation(24), rng.random(24).astype(np.float32)
    choice = gates.get(name)
    new = order_gates(mass, perm, n_sub, r, choice, down)
    score = choice(mass, np.sort(perm.reshape(n_sub, -1), axis=1), down)
    for old_block, block in zip(np.split(perm, n_sub), np.split(new, n_sub), strict=True):
        assert set(old_block) == set(block)
        assert list(block[r:]) == sorted(block[r:])
        assert score[block[:r]].min(initial=np.inf) >= score[block[r:]].max(initial=-np.inf) * (1 - 1e-9)
    shuffled = np.concatenate([rng.permutation(b) for b in np.split(perm, n_sub)])
    assert np.array_equal(order_gates(mass, shuffled, n_sub, r, choice, down), new)


def test_energy_weighs_by_the_down_projection() -> None:
    mass = np.array([[1, 2], [3, 0]], np.float32)
    blocks = np.array([[0], [1]])
    assert energy(mass, blocks, None).tolist() == [5, 2]
    assert energy(mass, blocks, np.array([1, 2], np.float32)).tolist() == [5, 8]


def test_centrality_equals_the_coactivation_matrix() -> None:
    mass = random_mass(1, width=8)
    active = mass >= np.sort(mass, 1)[:, 2:3]  # 6 of 8
    together = active.T.astype(int) @ active
    assert np.array_equal(centrality(mass, np.arange(8)[None]), together.sum(1) - np.diag(together))


def test_the_two_centralities_differ_in_what_they_rank_over() -> None:
    mass, blocks = random_mass(2, width=8), np.array([[0, 3, 5, 6], [1, 2, 4, 7]])
    whole = mass >= np.sort(mass, 1)[:, 2:3]  # 6 of the expert's 8
    for block in blocks:
        own = mass[:, block] >= np.sort(mass[:, block], 1)[:, 1:2]  # 3 of the block's 4
        for choice, flags in ((centrality, own), (centrality_expert, whole[:, block])):
            together = flags.T.astype(int) @ flags
            assert np.array_equal(choice(mass, blocks)[block], together.sum(1) - np.diag(together))


def test_ties_go_to_the_lower_id() -> None:
    perm = order_gates(np.ones((3, 8), np.float32), np.arange(8)[::-1], 2, 2)
    assert perm.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_bad_input_is_refused() -> None:
    mass = random_mass(0)
    with pytest.raises(UsageError, match="gate neurons"):
        order_gates(mass, np.arange(24), 4, 7)
    with pytest.raises(UsageError, match="down_norms"):
        order_gates(mass, np.arange(24), 4, 2, energy, np.ones(5, np.float32))
    with pytest.raises(CorruptError, match="permutation"):
        order_gates(mass, np.zeros(24, int), 4, 2)
    with pytest.raises(UsageError, match="active share"):
        centrality(mass, np.arange(24)[None], share=0.0)
