"""`plan.json`: round trip, the bare form, and everything a damaged or foreign file can hold."""

import json

import pytest

from moe_prism.errors import CorruptError, PrismError, UsageError
from moe_prism.routing import SkipPlan
from moe_prism.routing.token_threshold import ser


def test_round_trip(tmp_path):
    plan = ser((4, 3), 0.25, 2).with_(keep_mass=True, mean=2.5, made={"method": "ser"})
    plan.save(tmp_path / "plan.json")
    assert SkipPlan.load(tmp_path / "plan.json") == plan


def test_a_bare_mapping_is_a_plan(tmp_path):
    (tmp_path / "plan.json").write_text('{"1": 3, "0": 4}')
    plan = SkipPlan.load(tmp_path / "plan.json")
    assert plan == SkipPlan((4, 3)) and plan.policy == "top-n" and plan.keep_mass is None


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
        SkipPlan.load(tmp_path / "plan.json")


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        SkipPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff{")
    with pytest.raises(CorruptError, match="not JSON"):
        SkipPlan.load(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="cannot write"):
        SkipPlan((2,)).save(tmp_path / "nowhere" / "plan.json")


def test_a_plan_of_another_model():
    with pytest.raises(UsageError, match="3 MoE layers, the model 2"):
        SkipPlan((1, 1, 1)).check(2, 4)
