from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_prism.errors import CorruptError, UsageError
from moe_prism.frontier import DecodeTime, DomainQuality, Frontier, MeasuredPoint, SliceScore
from moe_prism.point import OperatingPoint, RoutingStage, SlotRule, WeightChange

NUMBER = st.floats(allow_nan=False, allow_infinity=False)
AMOUNT = st.floats(0, 1e300)
NAME = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)
SHARE = st.floats(0.001, 1)
OPERATING_POINTS = st.builds(
    OperatingPoint,
    weights=st.none() | st.builds(WeightChange, change=NAME, settings=st.dictionaries(st.text(), NUMBER, max_size=2)),
    routing=st.lists(
        st.builds(
            RoutingStage,
            layers=st.just((2, 1)),
            stage=NAME,
            parameters=st.dictionaries(NAME, st.tuples(st.tuples(SHARE), st.tuples(SHARE, SHARE)), max_size=2),
            keep_mass=st.none() | st.booleans(),
        ),
        max_size=2,
    ).map(tuple),
    slots=st.builds(
        SlotRule,
        budget=SHARE,
        rule=NAME,
        scorer=NAME,
        compensate=st.booleans(),
        layers=st.none() | st.tuples(SHARE, SHARE),
    ),
)
TIMES = st.builds(DecodeTime, st.integers(1, 4096), AMOUNT, AMOUNT, AMOUNT, AMOUNT, st.integers(1, 4096))
KINDS = {
    "str": NAME,
    "float": AMOUNT,
    "bool": st.booleans(),
    "OperatingPoint | None": OPERATING_POINTS,
    "DecodeTime | None": st.none() | TIMES,
    "Mapping[str, SliceScore]": st.dictionaries(
        NAME, st.builds(SliceScore, SHARE, AMOUNT, SHARE, SHARE, SHARE, st.integers(1, 4096), st.booleans()), max_size=2
    ),
    "Mapping[str, DomainQuality]": st.dictionaries(NAME, st.builds(DomainQuality, AMOUNT, AMOUNT, SHARE), max_size=2),
}
SHARES = {"budget": st.floats(0, 1), "top1_agreement": st.floats(0, 1)}
POINTS = st.builds(MeasuredPoint, **({f.name: KINDS[f.type] for f in fields(MeasuredPoint)} | SHARES))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBER | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FRONTIERS = st.builds(
    Frontier,
    st.text(),
    st.text(),
    st.integers(1, 64),
    st.lists(POINTS, max_size=3).map(tuple),
    st.lists(POINTS, max_size=3).map(tuple),
    st.dictionaries(st.text(), PLAIN, max_size=3),
)
POINT = MeasuredPoint("product-8", "product", 0.5, 8, 9.1, 0.024, 0.93, 1e5, 2e5, 4e5, True)
FRONTIER = Frontier("nano", "org/nano", 4, (POINT,), (replace(POINT, name="top-2", rule="topk"),), {"seed": 0})


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(FRONTIERS)
def test_json_round_trip(frontier):
    assert Frontier.from_json(json.loads(json.dumps(frontier.to_json()))) == frontier


def test_keys_are_the_published_ones():
    data = FRONTIER.to_json()
    assert list(data) == ["model", "source", "n_sub", "points", "baseline_topk", "baseline_bits", "provenance"]
    keys = "name rule budget k_slots ppl kl top1_agreement active_expert_params active_expert_bytes flops_per_token pareto"
    keys += " resident_expert_bytes distinct_expert_bytes sends point"
    assert list(data["points"][0]) == list(data["baseline_topk"][0]) == keys.split()


OLDER = ("distinct_expert_bytes", "sends", "point")  # not in files of version 0.1


@pytest.mark.parametrize(
    ("rule", "point"),
    [
        ("product", OperatingPoint(slots=SlotRule(budget=0.5, rule="product"))),
        ("pattern", OperatingPoint(slots=SlotRule(budget=0.5, rule="pattern", scorer="gates"))),
        ("plan", OperatingPoint(slots=SlotRule(budget=0.5, rule="layer-budgets"))),
        ("linear", OperatingPoint(slots=SlotRule(budget=0.5, rule="whole-experts"))),
        ("topk", OperatingPoint(slots=SlotRule(budget=0.5, rule="whole-experts", compensate=False))),
        ("sensitivity", None),  # the plan was not in the file
        ("prune:gate-norm", None),
    ],
)
def test_points_of_version_01_can_be_run_where_rule_and_budget_say_all(rule, point):
    data = FRONTIER.to_json()
    [row] = data["points"]
    data["points"] = [{key: value for key, value in row.items() if key not in OLDER} | {"rule": rule}]
    [found] = Frontier.from_json(data).points
    assert found.point == point and found.distinct_expert_bytes == 0


def test_save_is_stable_complete_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "frontier.json"
    FRONTIER.save(path)
    first = path.read_bytes()
    Frontier.load(path).save(path)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["frontier.json"]


@pytest.mark.parametrize("key", ["model", "n_sub", "points", "provenance", "points.kl", "baseline_topk.pareto"])
def test_a_missing_key_is_named(key):
    data = FRONTIER.to_json()
    top, _, inner = key.partition(".")
    del (data[top][0] if inner else data)[inner or top]
    with pytest.raises(CorruptError, match=f"{inner or top}'.*missing; .*moe-prism frontier"):
        Frontier.from_json(data)


WRONG = [("kl", "0.1"), ("kl", True), ("kl", None), ("kl", float("nan")), ("ppl", float("inf")), ("ppl", 10**400)]


@pytest.mark.parametrize("key, value", [*WRONG, ("pareto", 1), ("name", 3)])
def test_a_wrong_value_is_named_and_never_written(key, value, tmp_path):
    data = FRONTIER.to_json()
    data["points"][0][key] = value
    with pytest.raises(CorruptError, match=rf"'points\[0\]\.{key}'"):
        Frontier.from_json(data)
    broken = replace(FRONTIER, points=(replace(POINT, **{key: value}),))
    with pytest.raises(CorruptError):
        broken.save(tmp_path / "frontier.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), {"deep": [float("inf")]}, {1: "key"}, object()])
def test_provenance_must_be_plain_json(value):
    with pytest.raises(CorruptError, match="provenance"):
        Frontier.from_json({**FRONTIER.to_json(), "provenance": {"k": value}})


@pytest.mark.parametrize("data", [None, [], {**FRONTIER.to_json(), "points": {}}, {**FRONTIER.to_json(), "points": [1]}])
def test_a_wrong_shape_is_refused(data):
    with pytest.raises(CorruptError):
        Frontier.from_json(data)


def test_files_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "cut.json").write_text('{"model": "na')
    with pytest.raises(CorruptError, match="not JSON"):
        Frontier.load(tmp_path / "cut.json")
    with pytest.raises(UsageError, match="cannot read"):
        Frontier.load(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot write"):
        FRONTIER.save(tmp_path / "no-folder" / "frontier.json")


def test_a_time_is_left_out_where_there_is_none_and_checked_where_there_is():
    assert "time" not in POINT.to_json()
    timed = replace(POINT, time=DecodeTime(8, 3.0, 2.5, 3.5, 0.75, 9)).to_json()
    assert timed["time"] == {"batch": 8, "ms_per_token": 3.0, "low": 2.5, "high": 3.5, "of_stock": 0.75, "turns": 9}
    for bad, names in (({"batch": 8}, "'time.ms_per_token' is missing"), (7, "'time' must be an object")):
        with pytest.raises(CorruptError, match=names):
            MeasuredPoint.from_json(timed | {"time": bad})
