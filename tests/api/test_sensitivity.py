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
from moe_prism.api import RefactorOptions, refactor
from moe_prism.api.sensitivity import plan_order, profile_budgets, unit_costs
from moe_prism.elastic.runtime import Setting
from moe_prism.elastic.threshold import dropped_energy, fit_levels
from moe_prism.errors import UsageError
from moe_prism.frontier.measure import measure
from tests.tiny_sources import digests

SLOTS = 8


def levels(scale=1.0, seed=0):
    values = scale * torch.rand(4000, generator=torch.Generator().manual_seed(seed))
    return fit_levels(values, torch.ones(4000))


def test_budgets_lie_evenly_inside():
    assert profile_budgets(1) == [0.5] and profile_budgets(3) == [0.25, 0.5, 0.75]


def test_unit_costs_are_the_measured_ones_where_measured():
    own = levels()
    budgets, losses = [0.25, 0.5, 0.75], [0.3, 0.06, 0.004]
    expected = [loss / dropped_energy(own, b) for b, loss in zip(budgets, losses, strict=True)]
    assert unit_costs(own, budgets, losses, budgets) == pytest.approx(expected)
    low, high = sorted(expected[:2])
    assert low <= unit_costs(own, budgets, losses, [0.4])[0] <= high
    assert unit_costs(own, budgets, losses, [0.01, 0.99]) == pytest.approx([expected[0], expected[-1]])


@given(st.lists(st.floats(0, 10), min_size=1, max_size=5), st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_every_layer_gets_every_slot_once_and_one_to_begin_with(losses, slots):
    order = plan_order([levels(seed=i) for i in range(len(losses))], [0.5], [[loss] for loss in losses], slots)
    assert order[: len(losses)] == list(range(len(losses)))
    assert all(order.count(layer) == slots for layer in range(len(losses)))


def test_the_layer_that_loses_more_is_served_first():
    order = plan_order([levels(), levels()], [0.5], [[1.0], [0.01]], SLOTS)
    half = order[:SLOTS]
    assert half.count(0) > half.count(1) >= 1
    assert plan_order([levels(), levels()], [0.5], [[0.01], [1.0]], SLOTS)[:SLOTS].count(1) > half.count(1)


@pytest.fixture(scope="module")
def profiled(tiny_source, tiny_calibration, tmp_path_factory):
    """The tiny model, profiled at three budgets."""
    out = tmp_path_factory.mktemp("profiled") / "out"
    refactor(tiny_source, out, options(tiny_calibration))
    return out


def options(calibration):
    return RefactorOptions(profile_tokens=256, profile_points=3, calibration=replace(calibration, tokens=1024))


def test_the_profile_is_in_the_facts_and_the_plan_beside_the_weights(profiled):
    rows = json.loads((profiled / "prism.json").read_text())["layers"]
    side = load_file(str(profiled / "prism.safetensors"))
    for i, row in enumerate(rows):
        assert [point["budget"] for point in row["profile"]] == [0.25, 0.5, 0.75]
        assert all(point["kl"] > 0 for point in row["profile"]) and row["sensitivity"] > 0
        assert (side[f"layers.{i}.plan"].diff() >= 0).all()
    assert not list(profiled.glob("profile-*")) and moe_prism.verify(profiled)


def test_a_profile_measures_one_layer_alone(profiled, tiny_source, tiny_calibration, tmp_path):
    """One point, one layer, by hand: an unpooled copy with that layer at half its slots."""
    base = options(tiny_calibration)
    refactor(tiny_source, tmp_path / "own", replace(base, profile_tokens=0))
    model, _ = moe_prism.load(tmp_path / "own")
    from moe_prism.api.calibration import calibration_windows

    windows = calibration_windows(tiny_source, base.calibration).ids
    ids = windows[:: len(windows) // 8][:8]  # 256 tokens in windows of 32
    rows = json.loads((profiled / "prism.json").read_text())["layers"]
    for i, row in enumerate(rows):
        setting = Setting(rule="threshold", layers=tuple(0.5 if i == j else 1.0 for j in range(len(rows))))
        (quality, _), *_ = measure(model, model._moe_prism, ids, [setting])
        assert row["profile"][1]["kl"] == pytest.approx(quality.kl, rel=1e-3)


def test_the_plan_is_exact_at_full_budget_and_counts_on_average(profiled):
    model, tokenizer = moe_prism.load(profiled)
    rows = tokenizer("import os\n" * 8, return_tensors="pt")
    expected = model(**rows).logits
    model._moe_prism.always_split = True
    with torch.no_grad(), moe_prism.operating_point(model, 1.0, rule="plan"):
        torch.testing.assert_close(model(**rows).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with torch.no_grad(), moe_prism.operating_point(model, 0.5, rule="plan") as elastic:
        elastic.reset_counters()
        model(**rows)
        kept = [layer.counter.kept for layer in elastic.layers]
        assert sum(kept) * 2 == sum(layer.counter.chosen * 4 for layer in elastic.layers)


def test_an_interrupted_profile_goes_on_with_the_next_budget(profiled, tiny_source, tiny_calibration, tmp_path):
    seen, stop_at = [], 2

    @contextmanager
    def report(title):
        def update(done, total):
            if title == "sensitivity":
                seen.append((done, total))
                if len(seen) == stop_at:
                    raise KeyboardInterrupt

        yield update

    # a batch holds 16 windows of 32, so each of the three budgets is one batch of 8 windows
    with pytest.raises(KeyboardInterrupt):
        refactor(tiny_source, tmp_path / "out", options(tiny_calibration), report=report)
    assert seen == [(8, 24), (16, 24)]
    seen, stop_at = [], 0
    refactor(tiny_source, tmp_path / "out", options(tiny_calibration), resume=True, report=report)
    assert seen == [(8, 16), (16, 16)]  # the first budget is not repeated
    assert digests(tmp_path / "out") == digests(profiled)


def test_no_point_is_no_profile():
    with pytest.raises(UsageError, match="measures nothing"):
        RefactorOptions(profile_points=0).check()
