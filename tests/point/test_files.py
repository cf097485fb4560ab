"""Points in files: written, read, found by name or by path; files of version 0.1."""

from __future__ import annotations

import json

import pytest

from moe_prism.errors import CorruptError, UsageError
from moe_prism.frontier import Frontier
from moe_prism.point import (
    FULL,
    NamedPoint,
    OperatingPoint,
    RoutingStage,
    SlotRule,
    find_point,
    name_within,
    read_points,
    write_point,
)

POINT = OperatingPoint(routing=(RoutingStage(layers=(2, 1), keep_mass=True),), slots=SlotRule(budget=0.5))
OLD_PLAN = {
    "kind": "skip plan",
    "policy": "score-mass",
    "layers": {"0": 4, "1": 4},
    "mean": 2.5,
    "parameters": {"mass": [[0.5], [0.5]]},
    "keep_mass": True,
    "made": {"method": "score-mass"},
}
MEASURED = {
    "k_slots": 8.0,
    "ppl": 9.0,
    "kl": 0.1,
    "top1_agreement": 0.9,
    "active_expert_params": 1.0,
    "active_expert_bytes": 1.0,
    "flops_per_token": 1.0,
    "pareto": True,
}


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def entry(name, rule="product", budget=0.5, **more):
    return {**MEASURED, "name": name, "rule": rule, "budget": budget, **more}


def frontier(folder, *entries, plain=()):
    data = {"model": "m", "source": "s", "n_sub": 4, "points": list(entries), "baseline_topk": list(plain), "provenance": {}}
    return write(folder / "frontier.json", data)


def test_a_file_holds_the_point_its_name_and_its_making(tmp_path):
    named = NamedPoint(name="mine", point=POINT, made={"method": "uniform", "quality": {"kl": 0.1}})
    write_point(tmp_path / "p.json", named)
    assert read_points(tmp_path / "p.json") == [named]
    write_point(tmp_path / "again.json", named)
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    with pytest.raises(UsageError, match="cannot write"):
        write_point(tmp_path / "missing" / "p.json", named)


def test_a_bare_point_has_the_name_of_its_file(tmp_path):
    assert read_points(write(tmp_path / "half.json", POINT.to_json())) == [NamedPoint(name="half", point=POINT)]


def test_f13_a_skip_plan_of_version_0_1_is_upgraded(tmp_path):
    (named,) = read_points(write(tmp_path / "plan.json", OLD_PLAN))
    stage = RoutingStage(stage="score-mass", layers=(4, 4), parameters={"mass": ((0.5,), (0.5,))}, keep_mass=True)
    assert named == NamedPoint(name="plan", point=OperatingPoint(routing=(stage,)), made={"method": "score-mass", "mean": 2.5})


def test_a_mapping_from_layers_to_experts_is_a_point(tmp_path):
    (named,) = read_points(write(tmp_path / "plan.json", {"0": 2, "1": 1, "2": 3}))
    assert named.point == OperatingPoint(routing=(RoutingStage(layers=(2, 1, 3)),))


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"0": 2, "2": 1}, "one by one"),
        ({"0": 2, "1": "two"}, "'layers.1'"),
        ({}, "'layers' must have at least 1"),
        ({**OLD_PLAN, "kind": "recipe"}, "'recipe'"),
        ({**OLD_PLAN, "keep_mass": 1}, "'keep_mass'"),
        ({**OLD_PLAN, "parameters": {"mass": [["x"], [0.5]]}}, "'parameters.mass[0][0]'"),
        ({"point": {"schema": 7}}, "schema 7"),
        ({"point": FULL.to_json(), "name": ""}, "'name'"),
        ({"point": FULL.to_json(), "made": {"kl": float("nan")}}, "NaN is no number"),
        (3, "must be an object"),
    ],
)
def test_f13_what_is_wrong_with_a_file_is_one_line(tmp_path, data, names):
    with pytest.raises(CorruptError) as found:
        read_points(write(tmp_path / "p.json", data))
    assert names in str(found.value) and "\n" not in str(found.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(CorruptError, match="is not JSON"):
        read_points(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("[" * 100_000)
    with pytest.raises(CorruptError, match="is not JSON"):
        read_points(tmp_path / "p.json")
    with pytest.raises(UsageError, match="cannot read"):
        read_points(tmp_path / "missing.json")


def test_all_points_of_a_frontier(tmp_path):
    path = frontier(tmp_path, entry("a", point=POINT.to_json()), entry("b", point=FULL.to_json()))
    assert read_points(path) == [NamedPoint(name="a", point=POINT), NamedPoint(name="b", point=FULL)]


def test_a_frontier_of_version_0_1_is_upgraded_as_everywhere(tmp_path):
    """By `generate --point` and by whoever loads the record: the same points; what cannot be told is left out."""
    rules = [("plan", "layer-budgets"), ("linear", "whole-experts"), ("pattern", "pattern"), ("threshold", "threshold")]
    rows = [entry(f"{old}-8", old) for old, _ in rules]
    path = frontier(tmp_path, *rows, entry("ser-2", "ser"), plain=[entry("top-1", "topk", 0.25)])
    found = {p.name: p.point for p in read_points(path)}
    assert {name: point.slots.rule for name, point in found.items()} == {
        **{f"{old}-8": new for old, new in rules},
        "top-1": "whole-experts",
    }
    assert found["pattern-8"].slots.scorer == "gates" and found["plan-8"].slots == SlotRule(budget=0.5, rule="layer-budgets")
    assert found["top-1"].slots == SlotRule(budget=0.25, rule="whole-experts", compensate=False)
    loaded = Frontier.load(path)
    assert {p.name: p.point for p in (*loaded.points, *loaded.baseline_topk)} == {**found, "ser-2": None}
    with pytest.raises(UsageError, match="measure it again with `moe-prism frontier`"):
        read_points(frontier(tmp_path, entry("ser-2", "ser")))


def test_a_point_is_found_by_its_name_or_its_file(tmp_path):
    frontier(tmp_path, entry("product-8", point=POINT.to_json()), plain=[entry("top-1", "topk", 0.25)])
    write_point(tmp_path / "own.json", NamedPoint(name="own", point=FULL.with_budget(0.25)))
    assert find_point("product-8", tmp_path).point == POINT
    assert find_point("top-1", tmp_path).point.slots.budget == 0.25
    assert find_point(str(tmp_path / "own.json"), tmp_path).name == "own"
    with pytest.raises(UsageError, match="did you mean 'product-8'"):
        find_point("prodct-8", tmp_path)
    frontier(tmp_path, entry("uniform-1.5", point=POINT.to_json()), entry("b", point=FULL.to_json()))
    with pytest.raises(UsageError, match=r"did you mean 'uniform-1\.5'"):
        find_point("unifrm-1.5", tmp_path)
    with pytest.raises(UsageError, match="is no file and no operating point"):
        find_point("missing.json", tmp_path)
    with pytest.raises(UsageError, match="holds 2 operating points"):
        find_point(str(tmp_path / "frontier.json"), tmp_path)
    with pytest.raises(UsageError, match="measure some with `moe-prism frontier`"):
        find_point("product-8", tmp_path / "elsewhere")


def test_a_frontier_whose_points_cannot_be_run_does_not_stand_before_a_file(tmp_path):
    frontier(tmp_path, entry("ser-2", "ser"))
    write_point(tmp_path / "own.json", NamedPoint(name="own", point=POINT))
    assert find_point(str(tmp_path / "own.json"), tmp_path).point == POINT


def test_the_closest_name_within_some_bytes(tmp_path):
    """Of all rows, baselines too; what reads more is not taken however close it is."""
    rows = [
        entry(name, point=FULL.with_budget(budget).to_json()) | {"active_expert_bytes": size, "kl": kl}
        for name, budget, size, kl in (("a", 0.25, 100.0, 0.3), ("b", 0.5, 200.0, 0.1), ("c", 0.75, 300.0, 0.01))
    ]
    frontier(tmp_path, *rows, plain=[entry("top-1", "topk", 0.25) | {"active_expert_bytes": 150.0, "kl": 0.05}])
    assert [name_within(size, tmp_path) for size in (100, 199, 299, 1e9)] == ["a", "top-1", "top-1", "c"]
    with pytest.raises(UsageError, match="the cheapest reads 100"):
        name_within(99, tmp_path)
    with pytest.raises(UsageError, match="measure points"):
        name_within(99, tmp_path / "elsewhere")
