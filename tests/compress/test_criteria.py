"""Criteria and the choice, without a model: invariants."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.calibrate.confidence import BINS
from moe_prism.compress.prune import LayerSubject, PruneRequest, choose, criteria
from moe_prism.compress.prune.protect import super_experts
from moe_prism.errors import UsageError
from moe_prism.model.router import RoutingGroups

E = 12
BLIND = {name for name in criteria.names() if criteria.get(name).is_blind}
SIGHTED = [name for name in criteria.names() if name not in BLIND and "grams" not in criteria.get(name).needs]


def values(seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    rand = lambda: torch.rand(E, generator=g, dtype=torch.float64)  # noqa: E731
    count = torch.randint(1, 1000, (E,), generator=g)
    outputs = {name: rand() for name in ("norm", "norm_sq", "gated", "gated_sq", "easy")}
    outputs |= {"count": count, "max": rand().float(), "hidden_max": torch.ones(1), "residual_tokens": torch.ones(1)}
    return {
        "counts": {"count": count, "weight_sum": rand()},
        "scores": {"prob_sum": rand(), "tokens": torch.ones(1)},
        "confidence": {
            "utility": torch.rand(E, BINS, generator=g, dtype=torch.float64),
            "top": torch.tensor([500.0], dtype=torch.float64),
            "score_sum": rand(),
            "tokens": torch.tensor([1000]),
        },
        "outputs": outputs,
        "means": {name: rand() for name in ("square", "weight")}
        | {"count": count, "sum": torch.rand(E, 3, generator=g, dtype=torch.float64), "tokens": torch.full((1,), 1000)},
    }


def permuted(found: dict, order: torch.Tensor) -> dict:
    return {c: {k: v[order] if v.shape[:1] == (E,) else v for k, v in inner.items()} for c, inner in found.items()}


def subject(found: dict, seed: int = 0) -> LayerSubject:
    return LayerSubject(0, "layer", E, 2, found, torch.zeros(E, dtype=torch.bool), seed)


def free(layers: int = 1) -> list[torch.Tensor]:
    return [torch.zeros(E, dtype=torch.bool)] * layers


@pytest.mark.parametrize("name", SIGHTED)
@given(order=st.permutations(range(E)), seed=st.integers(0, 5), keep=st.sampled_from([0.25, 0.5, 0.75]))
@settings(max_examples=20, deadline=None)
def test_permuting_expert_ids_permutes_what_is_kept(name, order, seed, keep):
    criterion, found, order = criteria.get(name)(), values(seed), torch.tensor(order)
    plain = choose([criterion.scores(subject(found))], PruneRequest(keep), 2, free(), [None])[0]
    moved = choose([criterion.scores(subject(permuted(found, order)))], PruneRequest(keep), 2, free(), [None])[0]
    assert sorted(int(order[e]) for e in moved.kept) == list(plain.kept)


@pytest.mark.parametrize("name", [*SIGHTED, *sorted(BLIND)])
def test_what_is_kept_is_nested(name):
    scores = criteria.get(name)().scores(subject(values()))
    kept = [set(choose([scores], PruneRequest(k / E), 2, free(), [None])[0].kept) for k in range(2, E + 1)]
    assert [len(k) for k in kept] == list(range(2, E + 1))
    assert all(a < b for a, b in pairwise(kept))


def test_positions():
    def kept(name: str) -> list[int]:
        return list(choose([criteria.get(name)().scores(subject({}))], PruneRequest(0.5), 2, free(), [None])[0].kept)

    assert kept("odd") == [1, 3, 5, 7, 9, 11]
    assert kept("even") == [0, 2, 4, 6, 8, 10]
    assert kept("first-half") == [0, 1, 2, 3, 4, 5]
    assert kept("last-half") == [6, 7, 8, 9, 10, 11]


def test_random_draws_differ_by_layer_and_seed_and_repeat():
    def draw(layer: int, seed: int) -> list[float]:
        return criteria.get("random")().scores(LayerSubject(layer, "", E, 2, {}, free()[0], seed)).tolist()

    assert draw(0, 0) == draw(0, 0)
    assert draw(0, 0) != draw(1, 0) and draw(0, 0) != draw(0, 1)


def test_formulas():
    found = values()
    out = found["outputs"]
    for name, wanted in (
        ("gate-norm", out["gated"] / out["count"]), ("activation-norm", out["norm"] / out["count"]), ("easy-ep", out["easy"]),
        ("energy", out["gated_sq"]), ("hard-count", found["counts"]["count"].double()), ("soft-count", found["scores"]["prob_sum"]),
        ("soft-selected", found["counts"]["weight_sum"]),
    ):  # fmt: skip
        assert torch.equal(criteria.get(name)().scores(subject(found)), wanted), name


def test_ties_go_to_the_lower_id():
    assert choose([torch.ones(E)], PruneRequest(0.5), 2, free(), [None])[0].kept == tuple(range(6))


def test_an_expert_that_was_never_chosen_goes_first():
    found = values()
    found["outputs"]["count"][3] = 0
    for name in ("gated", "norm"):
        found["outputs"][name][3] = 0
    for name in ("gate-norm", "activation-norm"):
        assert 3 not in choose([criteria.get(name)().scores(subject(found))], PruneRequest(11 / 12), 2, free(), [None])[0].kept


def test_missing_statistics_are_named():
    with pytest.raises(UsageError, match="outputs"):
        criteria.get("gate-norm")().scores(subject({}))
    found = values()
    found["scores"]["tokens"][0] = 0
    with pytest.raises(UsageError, match="soft-selected"):
        criteria.get("soft-count")().scores(subject(found))


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, float("nan")])
def test_shares_outside_the_range_are_refused(keep):
    with pytest.raises(UsageError, match="outside"):
        choose([torch.ones(E)], PruneRequest(keep), 2, free(), [None])


def test_fewer_experts_than_a_token_uses_are_refused():
    with pytest.raises(UsageError, match="a token uses 4"):
        choose([torch.ones(E)], PruneRequest(0.25), 4, free(), [None])


def test_global_allocation_ranks_shares_and_keeps_k_everywhere():
    flat, steep = torch.ones(E), torch.tensor([100.0, 50.0] + [0.01] * (E - 2))
    choices = choose([flat, steep], PruneRequest(0.5, "global"), 2, free(2), [None, None])
    assert [len(c.kept) for c in choices] == [10, 2]
    assert choices[1].kept == (0, 1)
    scaled = choose([flat * 7, steep], PruneRequest(0.5, "global"), 2, free(2), [None, None])
    assert scaled == choices  # the unit of a layer's scores does not matter


@given(
    keep=st.sampled_from([0.25, 0.5, 0.75]), allocation=st.sampled_from(["layer", "global"]), seed=st.integers(0, 20),
    shields=st.lists(st.lists(st.booleans(), min_size=E, max_size=E), min_size=2, max_size=2),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_protection_and_budget_always_hold(keep, allocation, seed, shields):
    g = torch.Generator().manual_seed(seed)
    scores, masks = [torch.rand(E, generator=g) for _ in range(2)], [torch.tensor(s) for s in shields]
    n = round(keep * E)
    if any(int(m.sum()) > n for m in masks):
        with pytest.raises(UsageError, match="protected"):
            choose(scores, PruneRequest(keep, allocation), 2, masks, [None, None])
        return
    choices = choose(scores, PruneRequest(keep, allocation), 2, masks, [None, None])
    assert sum(len(c.kept) for c in choices) == 2 * n
    for choice, mask in zip(choices, masks, strict=True):
        assert set(mask.nonzero().flatten().tolist()) <= set(choice.kept)
        assert len(choice.kept) >= 2 and list(choice.kept) == sorted(set(choice.kept))


GROUPS = RoutingGroups(4, 2, 2)


def group_choice(mode: str, keep: float, k: int = 2, groups: RoutingGroups = GROUPS, shield: torch.Tensor | None = None):
    scores = torch.arange(16.0)
    mask = torch.zeros(16, dtype=torch.bool) if shield is None else shield
    return choose([scores], PruneRequest(keep, groups=mode), k, [mask], [groups])[0]


def test_group_modes():
    assert group_choice("per_group", 0.5).kept == (2, 3, 6, 7, 10, 11, 14, 15)
    assert group_choice("regroup", 0.5).kept == tuple(range(8, 16))
    dropped = group_choice("drop_groups", 0.5)
    assert dropped.kept == tuple(range(8, 16)) and dropped.groups == RoutingGroups(2, 2, 2)
    masked = group_choice("mask", 0.5)
    assert masked.kept == tuple(range(8, 16)) and masked.masked


@pytest.mark.parametrize(("mode", "keep", "k", "groups", "match"), [
    ("per_group", 10 / 16, 2, GROUPS, "equal groups"),
    ("per_group", 0.25, 2, GROUPS, "its score needs 2"),
    ("per_group", 0.5, 5, GROUPS, "needs 5"),
    ("regroup", 10 / 16, 2, GROUPS, "equal groups"),
    ("drop_groups", 10 / 16, 2, GROUPS, "whole groups"),
    ("drop_groups", 0.25, 2, GROUPS, "1 groups would stay"),
    ("mask", 3 / 16, 2, GROUPS, "mask leaves"),
    ("mask", 4 / 16, 4, RoutingGroups(4, 2, 1), "mask leaves"),
])  # fmt: skip
def test_impossible_groups_are_refused(mode, keep, k, groups, match):
    with pytest.raises(UsageError, match=match):
        group_choice(mode, keep, k, groups)


def test_groups_and_protection():
    shield = torch.zeros(16, dtype=torch.bool)
    shield[:2] = True
    assert group_choice("per_group", 0.5, shield=shield).kept[:2] == (0, 1)
    assert set(range(4)) < set(group_choice("drop_groups", 0.5, shield=shield).kept)
    shield[:3] = True
    with pytest.raises(UsageError, match="group 0 has 3 protected"):
        group_choice("per_group", 0.5, shield=shield)
    with pytest.raises(UsageError, match="unequal groups"):
        choose([torch.rand(16)], PruneRequest(0.5, "global"), 2, [torch.zeros(16, dtype=torch.bool)], [GROUPS])


def outputs_of(peaks: list[torch.Tensor], hidden: list[float], seen: int = 1) -> list[dict]:
    return [
        {"outputs": {"max": p, "hidden_max": torch.tensor([h]), "residual_tokens": torch.tensor([seen])}}
        for p, h in zip(peaks, hidden, strict=True)
    ]


def test_super_experts_are_the_outliers_of_forming_layers():
    g = torch.Generator().manual_seed(0)
    peaks = [torch.rand(64, generator=g) + 0.5 for _ in range(4)]
    peaks[1][7] = 100.0
    peaks[3][2] = 80.0  # as large, but after the massive activations were formed
    found = super_experts(outputs_of(peaks, [1.0, 90.0, 100.0, 100.0]))
    assert [f.nonzero().flatten().tolist() for f in found] == [[], [7], [], []]
    # where the residual stream is not known, layers below three quarters of the depth
    assert (
        super_experts(outputs_of(peaks, [0.0] * 4, seen=0))[1][7]
        and not super_experts(outputs_of(peaks, [0.0] * 4, seen=0))[3][2]
    )


def test_without_an_outlier_there_is_no_super_expert():
    g = torch.Generator().manual_seed(0)
    peaks = [torch.rand(64, generator=g) + 0.5 for _ in range(2)]
    assert not any(f.any() for f in super_experts(outputs_of(peaks, [1.0, 1.0])))
