"""From a profile of each layer to what every layer gets."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import moe_prism
from moe_prism.elastic.rules.threshold import fit_cutoffs
from moe_prism.errors import UsageError
from moe_prism.frontier.measure import measure
from moe_prism.jobs.profile_layers import budget_tensors, loss_curve, plan_order, profile_runs, unit_cost
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.point import OperatingPoint, SlotRule
from tests.tiny_sources import digests

SLOTS = 8


def levels(scale=1.0, seed=0):
    values = scale * torch.rand(4000, generator=torch.Generator().manual_seed(seed))
    return fit_cutoffs(values, torch.ones(4000))


def test_what_is_run():
    assert profile_runs(0) == [("threshold", 0.5)]
    assert profile_runs(3) == [("threshold", 0.5), ("product", 0.25), ("product", 0.5), ("product", 0.75)]


def test_a_curve_passes_through_what_was_measured_and_ends_at_nothing():
    own, profile = levels(), [(0.25, 0.3), (0.5, 0.06), (0.75, 0.004)]
    curve = loss_curve(own, profile, SLOTS)
    assert len(curve) == SLOTS and curve[-1] == 0
    assert [curve[1], curve[3], curve[5]] == pytest.approx([loss for _, loss in profile])
    costs = [unit_cost(own, (i + 1) / SLOTS, loss) for i, loss in enumerate(curve[:-1])]
    assert costs[0] == pytest.approx(costs[1]) and costs[-1] == pytest.approx(costs[-2])  # flat beyond the ends
    assert costs[2] == pytest.approx((costs[1] * costs[3]) ** 0.5)


@given(st.lists(st.lists(st.floats(0, 10), min_size=6, max_size=6), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_every_layer_gets_every_slot_once_and_one_to_begin_with(curves):
    order = plan_order(curves)
    assert order[: len(curves)] == list(range(len(curves)))
    assert all(order.count(layer) == 6 for layer in range(len(curves)))


def test_the_layer_that_loses_more_is_served_first():
    def half(losses):
        """Slots of each layer at half of all."""
        made = budget_tensors([levels()] * 2, [[(0.5, loss)] for loss in losses], SLOTS)
        return [int((steps <= 0.5).sum()) for steps in made]

    first, second = half([1.0, 0.01])
    assert first > second >= 1 and first + second == SLOTS
    assert half([0.01, 1.0]) == [second, first]


@pytest.fixture(scope="module")
def profiled(tiny_source, tiny_calibration, tmp_path_factory):
    """The tiny model, with two points for its plan."""
    out = tmp_path_factory.mktemp("profiled") / "out"
    refactor(tiny_source, out, options(tiny_calibration))
    return out


def options(calibration):
    return RefactorOptions(profile_tokens=256, profile_points=2, calibration=replace(calibration, tokens=1024))


def test_the_profile_is_in_the_facts_and_the_plan_beside_the_weights(profiled):
    rows = json.loads((profiled / "prism.json").read_text())["layers"]
    side = load_file(str(profiled / "prism.safetensors"))
    for i, row in enumerate(rows):
        assert [(run["rule"], run["budget"]) for run in row["profile"]] == profile_runs(2)
        assert all(run["kl"] > 0 for run in row["profile"]) and row["sensitivity"] > 0
        assert (side[f"layers.{i}.layer_budgets"].diff() >= 0).all()
    assert not list(profiled.glob("profile-*")) and moe_prism.verify(profiled)


def test_a_profile_measures_one_layer_alone(profiled, tiny_source, tiny_calibration, tmp_path):
    """Every run by hand, on a copy whose levels were not pooled."""
    base = options(tiny_calibration)
    refactor(tiny_source, tmp_path / "own", replace(base, profile_tokens=0))
    model, _ = moe_prism.load(tmp_path / "own")
    from moe_prism.jobs.calibrate import calibration_windows

    windows = calibration_windows(tiny_source, base.calibration).ids
    ids = windows[:: len(windows) // 8][:8]  # 256 tokens in windows of 32
    rows = json.loads((profiled / "prism.json").read_text())["layers"]
    for i, row in enumerate(rows):
        for run in row["profile"]:
            alone = tuple(run["budget"] if i == j else 1.0 for j in range(len(rows)))
            [found] = measure(
                model, ids, [OperatingPoint(slots=SlotRule(rule=run["rule"], layers=alone, of="slots", control="none"))]
            )
            assert run["kl"] == pytest.approx(found.quality.kl, rel=1e-3)


def test_the_plan_is_exact_at_full_budget_and_counts_on_average(profiled):
    model, tokenizer = moe_prism.load(profiled)
    rows = tokenizer("import os\n" * 8, return_tensors="pt")
    expected = model(**rows).logits
    model._moe_prism.always_split = True
    with torch.no_grad(), moe_prism.operating_point(model, 1.0, rule="layer-budgets"):
        torch.testing.assert_close(model(**rows).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad(), moe_prism.operating_point(model, 0.5, rule="layer-budgets") as elastic, elastic.count():
        model(**rows)
        kept = [layer.counter.kept for layer in elastic.layers]
        assert sum(kept) * 2 == sum(layer.counter.chosen * 4 for layer in elastic.layers)


def test_an_interrupted_profile_goes_on_with_the_next_run(profiled, tiny_source, tiny_calibration, tmp_path):
    seen, stop_at = [], 2

    @contextmanager
    def report(title):
        def update(done, total):
            if title == "sensitivity":
                seen.append((done, total))
                if len(seen) == stop_at:
                    raise KeyboardInterrupt

        yield update

    # a batch holds 16 windows of 32, so each of the three runs is one batch of 8 windows
    with pytest.raises(KeyboardInterrupt):
        refactor(tiny_source, tmp_path / "out", options(tiny_calibration), report=report)
    assert seen == [(8, 24), (16, 24)]
    seen, stop_at = [], 0
    refactor(tiny_source, tmp_path / "out", options(tiny_calibration), resume=True, report=report)
    assert seen == [(8, 16), (16, 16)]  # the first run is not repeated
    assert digests(tmp_path / "out") == digests(profiled)


def test_fewer_than_no_points_are_refused():
    with pytest.raises(UsageError, match="--profile-points -1 is too small"):
        RefactorOptions(profile_points=-1).check()
