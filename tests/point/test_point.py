"""Operating points as data: equal by value, through JSON and back, and one line for everything that is wrong with a file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prism.errors import CorruptError, PrismError, UsageError
from moe_prism.point import FULL, Decoding, OperatingPoint, RoutingStage, SlotRule, WeightChange

LAYERS = 3
rows = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=2).map(tuple), min_size=LAYERS, max_size=LAYERS).map(tuple)
budgets = st.floats(0.01, 1)
stages = st.builds(
    RoutingStage,
    stage=st.sampled_from(["top-n", "score-mass"]),
    layers=st.lists(st.integers(1, 9), min_size=LAYERS, max_size=LAYERS).map(tuple),
    parameters=st.dictionaries(st.sampled_from(["mass", "cutoff"]), rows, max_size=2),
    keep_mass=st.sampled_from([True, False, None]),
)
settings_ = st.dictionaries(
    st.sampled_from("abc"), st.integers() | st.sampled_from(["x", ""]) | st.lists(st.booleans(), max_size=2)
)
points = st.builds(
    OperatingPoint,
    weights=st.none() | st.builds(WeightChange, change=st.just("prune"), settings=settings_),
    routing=st.lists(stages, max_size=2).map(tuple),
    slots=st.builds(
        SlotRule,
        budget=budgets,
        rule=st.sampled_from(["threshold", "product"]),
        scorer=st.sampled_from(["ridge", "gates"]),
        compensate=st.booleans(),
        layers=st.none() | st.lists(budgets, min_size=LAYERS, max_size=LAYERS).map(tuple),
    ),
    decoding=st.none() | st.builds(Decoding, method=st.just("greedy"), settings=settings_),
)


@given(points)
def test_every_point_survives_json(point):
    again = OperatingPoint.from_json(json.loads(json.dumps(point.to_json(), allow_nan=False)))
    assert again == point and again.to_json() == point.to_json()


def test_points_are_equal_by_value_and_do_not_change():
    one, other = (OperatingPoint(routing=(RoutingStage(layers=(2, 1)),), slots=SlotRule(budget=0.5)) for _ in range(2))
    assert one == other and one is not other and one != FULL
    with pytest.raises(AttributeError):
        one.slots.budget = 1.0
    with pytest.raises(TypeError):
        OperatingPoint(None)


def test_what_is_neutral():
    assert OperatingPoint() == FULL and FULL.is_full and FULL.is_per_token
    assert FULL.with_budget(1.0, "product").is_full and not FULL.with_budget(0.5).is_full
    assert not OperatingPoint(slots=SlotRule(layers=(1.0, 0.5))).is_full
    assert not OperatingPoint(routing=(RoutingStage(layers=(1,)),)).is_full
    assert not OperatingPoint(weights=WeightChange(change="prune")).is_per_token
    assert not OperatingPoint(decoding=Decoding(method="x")).is_per_token


def test_a_budget_leaves_the_rest_of_a_point_as_it_was():
    point = OperatingPoint(routing=(RoutingStage(layers=(1, 2)),), slots=SlotRule(compensate=False, layers=(0.5, 0.25)))
    changed = point.with_budget(0.75)
    assert changed.routing == point.routing and changed.slots == SlotRule(budget=0.75, compensate=False)
    assert point.with_budget(0.75, "pattern").slots.scorer == "gates"


@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan"), float("inf")])
def test_budgets_that_cannot_be(budget):
    with pytest.raises(UsageError, match="outside"):
        SlotRule(budget=budget)
    with pytest.raises(UsageError, match="outside"):
        SlotRule(layers=(0.5, budget))


def changed(*path, to):
    """A whole point's JSON with one value put in another's place."""
    stage = RoutingStage(layers=(1, 2), stage="score-mass", parameters={"mass": ((0.5,), (0.5,))})
    data = OperatingPoint(routing=(stage,), slots=SlotRule(budget=0.5, layers=(0.5, 1.0))).to_json()
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return data


WRONG = [
    (changed("schema", to=2), "schema 2"),
    (changed("schema", to="1"), "schema '1'"),
    (changed("colour", to="red"), "'colour'"),
    (changed("weights", to=[]), "'weights' must be an object"),
    (changed("weights", to={"change": 3}), "'weights.change'"),
    (changed("weights", to={"change": "x", "settings": {"a": float("nan")}}), "'weights.settings.a"),
    (changed("routing", to={}), "'routing' must be a list"),
    (changed("routing", 0, to=None), "'routing[0]'"),
    (changed("routing", 0, "layers", to=[]), "layers"),
    (changed("routing", 0, "layers", to=[1, 0]), "'routing[0].layers[1]'"),
    (changed("routing", 0, "layers", to=[1, 1.5]), "layers"),
    (changed("routing", 0, "layers", to=[1] * 10_000), "layers"),
    (changed("routing", 0, "stage", to=""), "'routing[0].stage'"),
    (changed("routing", 0, "keep_mass", to="yes"), "'routing[0].keep_mass'"),
    (changed("routing", 0, "parameters", "mass", to=[[0.5]]), "'mass'"),
    (changed("routing", 0, "parameters", "mass", to=[["a"], [0.5]]), "'routing[0].parameters.mass[0][0]'"),
    (changed("slots", "budget", to=0), "'slots.budget' must be greater than 0"),
    (changed("slots", "budget", to=True), "'slots.budget'"),
    (changed("slots", "budget", to=10**400), "'slots.budget'"),
    (changed("slots", "rule", to=None), "'slots.rule'"),
    (changed("slots", "compensate", to=1), "'slots.compensate'"),
    (changed("slots", "layers", to="all"), "'slots.layers'"),
    (changed("decoding", to={"settings": {}}), "'decoding.method'"),
    ([], "operating point: it must be an object"),
    ({}, "'schema' is missing"),
]


@pytest.mark.parametrize(("data", "names"), WRONG)
def test_what_is_wrong_is_named_in_one_line(data, names):
    with pytest.raises(PrismError) as found:
        OperatingPoint.from_json(data)
    assert names in str(found.value) and "\n" not in str(found.value)


def test_f13_a_version_from_the_future_is_refused_as_such():
    with pytest.raises(CorruptError, match="this version reads 1"):
        OperatingPoint.from_json({**FULL.to_json(), "schema": 99})
