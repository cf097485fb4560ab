"""Every routing stage against a brute force over tokens, its neutral setting, and its invariants."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import UsageError
from moe_prism.point import RoutingStage
from moe_prism.routing import Routed, routing_stages, stage_class
from moe_prism.routing.base import mean_kept
from moe_prism.routing.score_mass import ScoreMass, fit_score_mass, score_mass
from moe_prism.routing.token_threshold import TokenThreshold, fit_naee, fit_ser, naee, ser
from moe_prism.routing.top_n import TopN
from moe_prism.routing.weight_cutoff import WeightCutoff, fit_weight_cutoff

EXPERTS, K, LAYERS = 9, 4, 2


def made(variants):
    return stage_class(variants[0].stage)(variants)


def routed(stage, index, weight, layer=0, which=0):
    """(index, weight) of what a stage makes of a choice."""
    after = stage(Routed(torch.zeros(len(index), 1), index, weight, layer, EXPERTS, EXPERTS), which)
    return after.index, after.weight


def choices(seed, tokens=7, *, missing=False, equal=False):
    """index, weight [T, K] in the arbitrary order that an unsorted top-k gives."""
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=g)[:K] for _ in range(tokens)])
    weight = torch.rand(tokens, K, generator=g)
    if equal:
        weight = (weight * 3).ceil() / 3
    if missing:
        index[::2, 1] = -1
    return index, weight


def plans(n=2):
    """One of every stage, that skips something."""
    layers = (n,) * LAYERS
    whole = (K,) * LAYERS
    batch = RoutingStage(layers=layers, stage="batch-redistribution", parameters={"base": ((1.0,),) * LAYERS})
    cutoff = RoutingStage(layers=(3,) * LAYERS, stage="weight-cutoff", parameters={"cutoff": ((0.4,),) * LAYERS})
    return [
        RoutingStage(layers=layers), ser(whole, 0.4, 1), ser((3,) * LAYERS, 0.3, 2), score_mass(whole, 0.35), cutoff, batch,
    ]  # fmt: skip


def by_hand(plan, row_weights, index):
    """The kept positions of one token, from the definition."""
    order = sorted((j for j in range(K) if index[j] >= 0), key=lambda j: -row_weights[j])
    n = plan.layers[0]
    if plan.stage == "top-n":
        return set(order[:n])
    if plan.stage == "token-threshold":
        t, least = plan.parameters["t"][0][0], plan.parameters["least"][0][0]
        kept = []
        for rank, j in enumerate(order):
            if rank >= max(n, 1) or (rank >= least and row_weights[j] < t * row_weights[order[0]]):
                break
            kept.append(j)
        return set(kept)
    if plan.stage == "weight-cutoff":
        return set(order[:1]) | {j for j in order[:n] if row_weights[j] >= plan.parameters["cutoff"][0][0]}
    kept, held, mass = [], 0.0, sum(row_weights[j] for j in order)
    for j in order[:n]:
        if held >= (1 - plan.parameters["epsilon"][0][0]) * mass:
            break
        kept.append(j)
        held += row_weights[j]
    return set(kept)


@pytest.mark.parametrize("which", range(5))
@given(seed=st.integers(0, 500), missing=st.booleans())
@settings(max_examples=30, deadline=None)
def test_stages_keep_what_their_definition_says(which, seed, missing):
    plan = plans()[which]
    index, weight = choices(seed, missing=missing)
    kept, left = routed(made([plan]), index, weight)
    for t in range(len(index)):
        expected = by_hand(plan, weight[t].double().tolist(), index[t].tolist())
        assert {j for j in range(K) if kept[t, j] >= 0} == expected
        for j in range(K):
            assert (kept[t, j], left[t, j]) == ((index[t, j], weight[t, j]) if j in expected else (-1, 0))


@given(seed=st.integers(0, 500), n=st.integers(1, K), base=st.integers(1, K))
@settings(max_examples=50, deadline=None)
def test_redistribution_takes_the_largest_weights_of_the_batch(seed, n, base):
    index, weight = choices(seed)
    plan = RoutingStage(layers=(n,), stage="batch-redistribution", parameters={"base": ((float(base),),)})
    kept = routed(made([plan]), index, weight)[0] >= 0
    first = weight.argsort(1, descending=True)
    own = {(t, int(j)) for t in range(len(index)) for j in first[t, : min(base, n)]}
    others = sorted(itertools.product(range(len(index)), range(K)), key=lambda tj: -weight[tj])
    rest = [tj for tj in others if tj not in own][: max(0, n * len(index) - len(own))]
    assert {(t, j) for t, j in itertools.product(range(len(index)), range(K)) if kept[t, j]} == own | set(rest)
    assert kept.sum() == n * len(index)


@pytest.mark.parametrize("keep_mass", [False, True])
@pytest.mark.parametrize("stage", list(routing_stages.names()))
def test_neutral_stages_return_the_very_same_batch(stage, keep_mass):
    zero, one = ((0.0,),) * LAYERS, ((1.0,),) * LAYERS
    parameters = {"t": zero, "least": one, "epsilon": zero, "cutoff": zero, "base": one, "rank": zero}
    plan = RoutingStage(layers=(K, K + 3), stage=stage, parameters=parameters, keep_mass=keep_mass)
    index, weight = choices(0)
    for layer in range(LAYERS):
        assert made([plan]).is_neutral(layer, 0, K)
        batch = Routed(torch.zeros(len(index), 1), index, weight, layer, EXPERTS, EXPERTS)
        assert made([plan])(batch) is batch


@pytest.mark.parametrize("keep_mass", [False, True])
@pytest.mark.parametrize("which", range(6))
@given(seed=st.integers(0, 500), missing=st.booleans(), equal=st.booleans())
@settings(max_examples=20, deadline=None)
def test_every_token_has_its_own_plan(which, keep_mass, seed, missing, equal):
    """A token at the neutral plan keeps its choice to the bit, one at a skipping plan gets what it gets alone."""
    plan = replace(plans()[which], keep_mass=keep_mass)
    neutral = {name: tuple((1.0 if name == "base" else 0.0,) for _ in rows) for name, rows in plan.parameters.items()}
    stage = made([replace(plan, layers=(K,) * LAYERS, parameters=neutral), plan])
    index, weight = choices(seed, missing=missing, equal=equal)
    number = torch.arange(len(index)) % 2
    mixed, left = routed(stage, index, weight, which=number)
    assert torch.equal(mixed[number == 0], index[number == 0])
    assert torch.equal(left[number == 0], weight[number == 0].masked_fill(index[number == 0] < 0, 0))
    if stage.depends_on_batch:
        return
    alone = routed(stage, index[number == 1], weight[number == 1], which=1)
    assert torch.equal(mixed[number == 1], alone[0]) and torch.equal(left[number == 1], alone[1])


@pytest.mark.parametrize("which", range(6))
@given(seed=st.integers(0, 500), missing=st.booleans())
@settings(max_examples=20, deadline=None)
def test_keep_mass_keeps_the_mass_and_nothing_else(which, seed, missing):
    index, weight = choices(seed, missing=missing)
    plan = plans()[which]
    plain, scaled = (routed(made([replace(plan, keep_mass=flag)]), index, weight) for flag in (False, True))
    assert torch.equal(plain[0], scaled[0])
    full = weight.masked_fill(index < 0, 0).sum(1)
    torch.testing.assert_close(scaled[1].sum(1), full)
    torch.testing.assert_close(scaled[1], plain[1] * (full / plain[1].sum(1))[:, None])


@pytest.mark.parametrize("which", range(6))
@given(seed=st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_choices_does_not_matter(which, seed):
    """A router's top-k may come unsorted, and expert ids are only names."""
    index, weight = choices(seed)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    stage = made([plans()[which]])
    kept, left = routed(stage, index, weight)
    again = routed(stage, index[:, order], weight[:, order])
    assert torch.equal(again[0], kept[:, order]) and torch.equal(again[1], left[:, order])


@pytest.mark.parametrize("which", range(6))
def test_one_expert_is_always_kept(which):
    index, weight = choices(1)
    for values in (weight, weight * 0, weight.bfloat16()):
        kept, left = routed(made([plans(1)[which]]), index, values, 1)
        assert ((kept >= 0).sum(1) >= 1).all() and left.dtype == values.dtype


def test_no_tokens():
    for plan in plans():
        stage = made([replace(plan, keep_mass=True)])
        kept, left = routed(stage, torch.empty(0, K, dtype=torch.long), torch.empty(0, K))
        assert kept.shape == left.shape == (0, K)


def ranked(seed, tokens=500):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(tokens, K, generator=g).sort(1, descending=True).values for _ in range(LAYERS)]


@pytest.mark.parametrize("mean", [1.2, 2.0, 3.4])
def test_fits_keep_the_mean_that_was_asked_for(mean):
    samples, layers = ranked(3), (K,) * LAYERS
    for kind, plan in (
        (TokenThreshold, fit_ser(layers, samples, mean)),
        (TokenThreshold, fit_naee(layers, samples, mean)),
        (ScoreMass, fit_score_mass(layers, samples, mean)),
    ):
        assert mean <= mean_kept(kind([plan]), samples) < mean + 0.02


@pytest.mark.parametrize("counts", [(1, 4), (2, 3), (4, 4)])
def test_cutoffs_keep_the_counts_of_every_layer(counts):
    samples = ranked(6)
    stage = WeightCutoff([fit_weight_cutoff(counts, samples)])
    for layer, (n, rows) in enumerate(zip(counts, samples, strict=True)):
        assert abs(float(stage.kept(rows, layer, 0).sum(1).double().mean()) - n) < 0.01
    assert abs(mean_kept(stage, samples) - sum(counts) / 2) < 0.01


def test_least_is_a_floor():
    samples = ranked(4)
    assert mean_kept(TokenThreshold([fit_ser((K, K), samples, 2.0, least=2)]), samples) >= 2
    kept, _ = routed(made([ser((K, K), 1.0, 3)]), *choices(0))
    assert ((kept >= 0).sum(1) == 3).all()


def test_naee_at_its_median_skips_the_second_expert_of_half_the_tokens():
    """The paper's rule for top-2, from its definition."""
    samples = [rows[:, :2].contiguous() for rows in ranked(5)]
    plan = naee((2, 2), samples)
    index = torch.arange(2).expand(500, 2)
    for layer, rows in enumerate(samples):
        beta = plan.parameters["t"][layer][1]
        ratio = rows[:, 1] / rows[:, 0]
        assert abs(float((ratio < beta).float().mean()) - 0.5) < 0.01
        kept = routed(made([plan]), index, rows, layer)[0]
        assert torch.equal(kept[:, 1] < 0, rows[:, 1] < beta * rows[:, 0])
    assert abs(mean_kept(TokenThreshold([fit_naee((2, 2), samples)]), samples) - 1.5) < 0.01


def test_one_number_for_all_ranks_beside_one_for_each():
    """Two methods may write the same stage in both forms, and share a batch."""
    one = ser((K,) * LAYERS, 0.4, 1)
    each = replace(one, parameters={name: tuple(tuple(row) * K for row in rows) for name, rows in one.parameters.items()})
    index, weight = choices(0)
    alone = routed(made([one]), index, weight)
    for which in (0, 1):
        for found, wanted in zip(routed(made([one, each]), index, weight, which=which), alone, strict=True):
            assert torch.equal(found, wanted)


def test_bad_input():
    good = plans()[0]
    with pytest.raises(UsageError, match="no variant"):
        TopN([])
    with pytest.raises(UsageError, match="differ in layers"):
        made([good, RoutingStage(layers=(1, 1, 1))])
    with pytest.raises(UsageError, match="differ in layers or in keep_mass"):
        made([good, replace(good, keep_mass=True)])
    with pytest.raises(UsageError, match="unknown routing stage"):
        made([replace(good, stage="best")])
    with pytest.raises(UsageError, match="no parameter 't'"):
        made([RoutingStage(layers=(1, 1), stage="token-threshold")])
    stage = made([good])
    for which in (1, -1, torch.tensor([0, 2])):
        with pytest.raises(UsageError, match="there is no variant"):
            stage.check_which(which)
    with pytest.raises(UsageError, match="2 variants for 7 tokens"):
        routed(stage, *choices(0), which=torch.tensor([0, 0]))
