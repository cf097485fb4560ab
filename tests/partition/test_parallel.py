from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from moe_prism.errors import CorruptError, UsageError
from moe_prism.partition import parallel, solvers
from moe_prism.partition.parallel import expert_seed, solve_layer

ALT = partial(solvers.get("alt"), n_sub=4, dropped=3)


def masses(count: int) -> dict[int, np.ndarray]:
    return {e: np.exp(np.random.default_rng(e).standard_normal((20 + e, 16))).astype(np.float32) for e in range(count)}


def test_result_does_not_depend_on_threads_or_company() -> None:
    alt = partial(ALT, starts=2, shakes=2)
    serial = solve_layer(masses(6), alt, layer=2, seed=5, threads=1)
    pooled = solve_layer(masses(6), alt, layer=2, seed=5, threads=4)
    alone = solve_layer({4: lambda: masses(6)[4]}, alt, layer=2, seed=5)
    assert list(serial) == list(pooled) == list(range(6))
    for e in serial:
        assert np.array_equal(serial[e].perm, pooled[e].perm)
    assert np.array_equal(serial[4].perm, alone[4].perm)


def test_threads_are_the_cores_of_this_process(monkeypatch) -> None:
    made: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            made.append(count)
            super().__init__(count)

    monkeypatch.setattr(parallel, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(parallel, "cores", lambda: 3)
    solve_layer(masses(1), partial(ALT, starts=1, shakes=0))
    solve_layer(masses(1), partial(ALT, starts=1, shakes=0), threads=2)
    assert made == [3, 2]


def test_seeds_differ_by_expert_and_layer() -> None:
    assert len({expert_seed(s, layer, e) for s in range(3) for layer in range(8) for e in range(16)}) == 3 * 8 * 16


def test_errors_reach_the_caller() -> None:
    bad = masses(3)
    bad[1][0, 0] = np.nan
    with pytest.raises(CorruptError):
        solve_layer(bad, ALT)
    with pytest.raises(UsageError):
        solve_layer(masses(1), ALT, threads=0)
    assert solve_layer({}, ALT) == {}
