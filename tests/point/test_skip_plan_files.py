"""Files with one skip plan: round trip, the forms of version 0.1, and everything a damaged or foreign file can hold."""

import json
from dataclasses import replace

import pytest

from moe_prism.errors import CorruptError, PrismError, UsageError
from moe_prism.point import NamedPoint, OperatingPoint, RoutingStage, read_points, write_point
from moe_prism.routing.token_threshold import ser


def read(path):
    [named] = read_points(path)
    return named


def test_round_trip(tmp_path):
    stage = replace(ser((4, 3), 0.25, 2), keep_mass=True)
    named = NamedPoint(name="ser-2.5", point=OperatingPoint(routing=(stage,)), made={"method": "ser", "mean": 2.5})
    write_point(tmp_path / "plan.json", named)
    assert read(tmp_path / "plan.json") == named


def test_a_bare_mapping_is_a_plan(tmp_path):
    (tmp_path / "plan.json").write_text('{"1": 3, "0": 4}')
    assert read(tmp_path / "plan.json") == NamedPoint(name="plan", point=OperatingPoint(routing=(RoutingStage(layers=(4, 3)),)))


def test_a_plan_of_version_01_is_upgraded(tmp_path):
    """Written by `SkipPlan.save` of that version."""
    old = {
        "kind": "skip plan",
        "policy": "token-threshold",
        "layers": {"0": 4, "1": 3},
        "parameters": {"t": [[0.25], [0.25]], "least": [[2.0], [2.0]]},
        "keep_mass": True,
        "mean": 2.5,
        "made": {"method": "ser"},
    }
    (tmp_path / "plan.json").write_text(json.dumps(old))
    named = read(tmp_path / "plan.json")
    assert named.point == OperatingPoint(routing=(replace(ser((4, 3), 0.25, 2), keep_mass=True),))
    assert named.made == {"method": "ser", "mean": 2.5}


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"0": 2, "2": 2},
        {"a": 2},
        {"0": 2.0},
        {"0": True},
        {"0": 0},
        {"layers": [2, 2]},
        {"layers": {"0": 2}, "policy": 3},
        {"layers": {"0": 2}, "keep_mass": "yes"},
        {"layers": {"0": 2}, "mean": "2"},
        {"layers": {"0": 2}, "parameters": {"t": 0.5}},
        {"layers": {"0": 2}, "parameters": {"t": [0.5]}},
        {"layers": {"0": 2}, "parameters": {"t": [[]]}},
        {"layers": {"0": 2}, "parameters": {"t": [["x"]]}},
        {"layers": {"0": 2}, "parameters": {"t": [[0.5], [0.5]]}},
        {"layers": {"0": 2}, "made": "by hand"},
    ],
)
def test_what_is_no_plan(tmp_path, data):
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PrismError):
        read(tmp_path / "plan.json")


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff{")
    with pytest.raises(CorruptError, match="not JSON"):
        read(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="cannot write"):
        write_point(tmp_path / "nowhere" / "plan.json", NamedPoint(name="full", point=OperatingPoint()))


def test_a_plan_of_another_model():
    with pytest.raises(UsageError, match="3 MoE layers, the model 2"):
        RoutingStage(layers=(1, 1, 1)).check(2, 4)
