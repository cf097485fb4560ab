"""A refactor with compensation: what it writes, that full budget stays the source, that it is fitted layer by layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moe_prism
from moe_prism.artefact.load import side_tensors
from moe_prism.calibrate.options import CalibrateOptions
from moe_prism.data import token_windows
from moe_prism.frontier.measure import measure
from moe_prism.jobs.calibrate import calibrate_model
from moe_prism.jobs.frontier import measure_frontier
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.jobs.verify import verify
from moe_prism.model import load_model
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import FULL, OperatingPoint, SlotRule
from tests.tiny_sources import digests

METHODS = {"mean": {"vectors"}, "scale": {"factors"}, "low-rank": {"mean", "read", "write"}}


@pytest.fixture(scope="module")
def compensated(tiny_source, tiny_calibration, tmp_path_factory):
    """compensated(method): the tiny olmoe model with it, and its folder."""
    base = tmp_path_factory.mktemp("compensated")
    calibrate_model(tiny_source, base / "calibration", tiny_calibration)

    def get(method, again=""):
        folder = base / f"{method}{again}"
        if not folder.exists():
            options = RefactorOptions(compensate=method, calibration=tiny_calibration)
            refactor(tiny_source, folder, options, calibration=base / "calibration")
        return folder

    return get


@torch.no_grad()
@pytest.mark.parametrize("method", ["mean", pytest.param("scale", marks=pytest.mark.slow), "low-rank"])
def test_side_tensors_are_small_exact_at_full_budget_and_verified(compensated, tiny_source, method):
    folder = compensated(method)
    tensors = side_tensors(folder, 2)
    for layer in tensors:
        mine = {key: value for key, value in layer.items() if key.startswith("compensate.")}
        assert set(mine) == {f"compensate.{method}.{name}" for name in METHODS[method]}
        assert all(value.dtype == torch.bfloat16 and value.isfinite().all() for value in mine.values())
    assert verify(folder)
    model, tokenizer = moe_prism.load(folder)
    rows = tokenizer("class A:\n    pass", return_tensors="pt")
    expected = load_model(tiny_source, torch.float32)(**rows).logits
    for split in (False, True):
        model._moe_prism.always_split = split
        torch.testing.assert_close(model(**rows).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    with moe_prism.operating_point(model, point=OperatingPoint(slots=SlotRule(budget=0.5, of="slots"))):
        half = model(**rows).logits
    with moe_prism.operating_point(model, point=OperatingPoint(slots=SlotRule(budget=0.5, of="slots", compensate=False))):
        assert not torch.equal(model(**rows).logits, half)
    assert digests(compensated(method, " again")) == digests(folder)


def test_values_are_fitted_to_what_is_lost_after_compensation(compensated):
    plain, mean, scale = (side_tensors(compensated(method), 2)[0]["ridge"] for method in ("none", "mean", "scale"))
    assert torch.equal(plain, scale)  # scaling leaves the norm of a block what it is
    assert not torch.equal(plain, mean)


def test_plain_top_k_is_measured_without_compensation(compensated, text_file):
    options = FrontierOptions(text=str(text_file), tokens=512, length=32, rules=("product",))
    ours, plain = (measure_frontier(folder, options) for folder in (compensated("mean"), compensated("none")))
    assert [p.kl for p in ours.baseline_topk] == [p.kl for p in plain.baseline_topk]
    fewest = [min(f.points, key=lambda p: p.k_slots) for f in (ours, plain)]
    assert fewest[0].kl != fewest[1].kl and fewest[0].active_expert_params > fewest[1].active_expert_params


@torch.no_grad()
def test_a_dense_model_can_be_compensated(tiny_dense, tiny_calibration, tmp_path):
    options = RefactorOptions(compensate="mean", calibration=replace(tiny_calibration, tokens=512))
    refactor(tiny_dense, tmp_path / "out", options)
    model, tokenizer = moe_prism.load(tmp_path / "out")
    with moe_prism.operating_point(model, k=1):
        assert torch.isfinite(model(**tokenizer("import os", return_tensors="pt")).logits).all()


@pytest.mark.slow
def test_on_the_real_model_it_is_worth_more_than_it_costs(tmp_path):
    """At equal slots the KL falls by a fifth at least, for a few percent of the weights read."""
    found = []
    for method in ("mean", "none"):
        options = RefactorOptions(compensate=method, calibration=CalibrateOptions(tokens=4096))
        where = refactor("nano", tmp_path / method, options).folder
        model, tokenizer = moe_prism.load(where)
        ids = token_windows(tokenizer, "stdlib", "evaluation", length=256, tokens=2048).ids
        found.append(measure(model, ids, [FULL.with_budget(0.5, "threshold")])[0])
    better, plain = found
    assert better.quality.kl < 0.8 * plain.quality.kl
    dearer, cheaper = better.cost, plain.cost
    assert dearer.active_expert_params < 1.06 * cheaper.active_expert_params * dearer.k_slots / cheaper.k_slots
