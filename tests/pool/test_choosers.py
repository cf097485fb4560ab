"""What holds for every way of choosing among models, and what is special of each."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import UsageError
from moe_prism.pool import Record, SubsetLimits, choosers
from moe_prism.pool.gate import Gate, mixture
from moe_prism.pool.moe2 import fit_gate
from moe_prism.pool.rocket import brute_force, greedy, objective, select
from moe_prism.pool.subset import Needs, branch_and_bound, exhaustive
from moe_prism.pool.symbolic import Symbolic, answer_grouped, by_model, vote
from moe_prism.pool.text import embed

ALL = choosers.names()
ASKED = ("def parse(text): return text.strip()", "the town lay on the old river", "<div><p>more</p></div>", "", "\ud800 odd")


def fitted(name, limits=None, record=None):
    made = choosers.get(name)
    options, own, usual = made.example()
    return made.fit(options, own if record is None else record, usual if limits is None else limits, made.Parameters()), options


@pytest.mark.parametrize("name", ALL)
def test_an_order_holds_only_what_is_allowed_and_used(name):
    chooser, options = fitted(name)
    used = set(chooser.chosen())
    assert used and used <= set(range(len(options)))
    for text in ASKED:
        for allowed in ([], [1], [3, 0], list(range(len(options)))):
            found = chooser.order(text, allowed)
            assert set(found) == used & set(allowed) and len(found) == len(set(found))


@pytest.mark.parametrize("name", ALL)
def test_the_same_record_chooses_the_same(name):
    first, second = fitted(name)[0], fitted(name)[0]
    assert [first.order(text, range(4)) for text in ASKED] == [second.order(text, range(4)) for text in ASKED]


@pytest.mark.parametrize("name", ALL)
def test_no_option_beyond_a_limit_is_ever_used(name):
    chooser, _ = fitted(name, SubsetLimits(seconds=0.15))
    assert chooser.chosen() == [3]
    chooser, _ = fitted(name, SubsetLimits(energy=1.5))
    assert chooser.chosen() == [3]
    with pytest.raises(UsageError, match="within its limits"):
        fitted(name, SubsetLimits(seconds=0.01))


@pytest.mark.parametrize("name", ALL)
def test_who_needs_a_record_says_so(name):
    made = choosers.get(name)
    options, _, limits = made.example()
    if made.needs_record:
        with pytest.raises(UsageError, match=f"'{name}' needs a record"):
            made.fit(options, None, limits, made.Parameters())
    else:
        assert made.fit(options, None, limits, made.Parameters()).chosen() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [name for name in ALL if choosers.get(name).needs_record])
def test_a_question_goes_to_the_model_that_knows_its_kind(name):
    chooser, _ = fitted(name)
    assert [chooser.order(text, range(4))[0] for text in ASKED[:3]] == [0, 1, 2]


@pytest.mark.parametrize("name", [name for name in ALL if choosers.get(name).needs_record])
def test_a_record_that_does_not_fit_is_refused(name):
    made = choosers.get(name)
    options, record, limits = made.example()
    wrong = (
        replace(record, quality=record.quality[:, :2]),
        replace(record, quality=record.quality + 1),
        replace(record, seconds=record.seconds * math.nan),
        replace(record, energy=record.energy[:1]),
        replace(record, skills=[("a",)]),
        Record([], np.zeros((0, 4)), np.zeros((0, 4)), record.energy),
    )
    for each in wrong:
        with pytest.raises(UsageError, match="record"):
            made.fit(options, each, limits, made.Parameters())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31 - 1), st.integers(1, 7))
def test_branch_and_bound_finds_what_all_subsets_have(seed, options):
    drawn = np.random.default_rng(seed)
    quality = np.round(drawn.random((6, options)), 1)  # ties too
    seconds, energy = drawn.random(options), np.round(drawn.random(options), 1)
    limits = SubsetLimits(float(drawn.random()) * 1.2, float(drawn.random()) * options / 2)
    owners = drawn.integers(options, size=options).tolist() if seed % 2 else None
    needs = Needs.of(seconds, energy, owners)
    every, found = (search(quality, needs, limits) for search in (exhaustive, branch_and_bound))
    assert found.chosen == every.chosen and math.isclose(found.quality, every.quality)
    assert needs.fit(limits, found.chosen)


def test_options_of_one_model_take_its_energy_once():
    needs = Needs.of(np.ones(3), np.array([2.0, 3.0, 1.0]), [0, 0, 1])
    assert needs.total((0, 1)) == 3.0 and needs.total((0, 1, 2)) == 4.0 and needs.total(()) == 0.0


def test_branch_and_bound_looks_at_few_of_many_subsets():
    drawn = np.random.default_rng(0)
    quality, energy = drawn.random((40, 16)), drawn.random(16)
    found = branch_and_bound(quality, Needs.of(drawn.random(16), energy, None), SubsetLimits(0.9, 2.0))
    assert found.chosen and found.looked < 2**16 / 4


def test_the_gate_of_all_options_is_the_gate_of_a_subset():
    _, record, _ = choosers.get("moe2").example()
    some = [0, 3]
    weights, mean = fit_gate(record, 1.0)
    alone, alone_mean = fit_gate(replace(record, quality=record.quality[:, some]), 1.0)
    np.testing.assert_allclose(weights[:, some], alone, atol=1e-12)
    np.testing.assert_allclose(mean[some], alone_mean, atol=1e-12)


RECRUITS = [["b", "a", "b"], ["a"], ["c", "a"], ["b"]]


def test_every_model_is_loaded_once_and_grouping_changes_no_answer():
    loaded = []

    def load(model):
        loaded.append(model)
        return lambda question: f"{model}{question}"

    found = answer_grouped(RECRUITS, load)
    assert loaded == ["b", "a", "c"] and by_model(RECRUITS) == {"b": [0, 3], "a": [0, 1, 2], "c": [2]}
    assert found == [{m: f"{m}{q}" for m in own} for q, own in enumerate(RECRUITS)]
    assert vote({"a": "x", "b": "y"}, ["b", "a", "b"]) == "y" and vote({"a": "x", "b": "y"}, ["a", "b"]) == "x"


def test_a_model_that_is_hardly_ever_recruited_is_dropped():
    made = choosers.get("symbolic")
    options, record, limits = made.example()
    quality = record.quality.copy()
    quality[:, 3] = 0
    weak = Symbolic.fit(
        options, replace(record, quality=quality), limits, replace(made.Parameters(), least=0.4, temperature=0.05)
    )
    assert 3 not in weak.chosen() and all(o in weak.chosen() for o in weak.recruit(ASKED[0]))


def test_named_skills_take_the_place_of_words():
    made = choosers.get("symbolic")
    options, record, limits = made.example()
    skills = [(("code", "prose", "web")[q % 3],) for q in range(len(record.texts))]
    chooser = made.fit(options, replace(record, skills=skills), limits, made.Parameters())
    assert chooser.order("prose", range(4))[0] == 1 and chooser.order("webs", range(4))[0] == 2


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4))
def test_greedy_has_its_share_of_the_best(seed, size):
    worth = np.random.default_rng(seed).random((5, 7)) ** 3
    best = objective(worth, brute_force(worth, size))
    assert objective(worth, greedy(worth, size)) >= (1 - 1 / math.e) * best - 1e-12


def test_a_twin_of_what_is_chosen_comes_after_one_that_is_worse_and_different():
    score = np.array([0.9, 0.89, 0.6])
    similarity = np.array([[1, 0.99, 0.1], [0.99, 1, 0.1], [0.1, 0.1, 1]])
    assert select(score, similarity, 2) == [0, 2]


def test_a_mixture_is_no_less_likely_than_its_best_expert_and_a_gate_can_follow_tokens():
    drawn = np.random.default_rng(3)
    kind = drawn.integers(2, size=200)
    features = np.eye(2)[kind]
    likely = np.log(np.where(np.arange(2) == kind[:, None], 0.8, 0.2))
    gate = Gate.fit(features, likely, 1e-3)
    found = mixture(gate.weights(features), likely)
    assert found.mean() >= likely.mean(0).max() and found.mean() > math.log(0.75)
    blind = Gate.fit(np.zeros((200, 1)), likely, 1.0)
    assert mixture(blind.weights(np.zeros((200, 1))), likely).mean() >= likely.mean(0).max() - 1e-9
    one = np.eye(2)[np.zeros(200, int)]
    np.testing.assert_array_equal(mixture(one, likely), likely[:, 0])


def test_a_text_is_a_vector_of_length_one():
    assert np.isclose(np.linalg.norm(embed("ab")), 1) and not embed("").any()
    assert (embed("the same text") == embed("the same text")).all()
