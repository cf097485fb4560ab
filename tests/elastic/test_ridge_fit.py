"""Fits from factors in float32 are those of the readable form in float64."""

from __future__ import annotations

import pytest
import torch

from moe_prism.elastic.scorers import ridge_fit as module
from moe_prism.elastic.scorers.ridge_fit import exact_fit, fast_fit, held_out, ridge_fit


def sample(rows, features, kind, seed=0):
    """(z, y) in float64. kind: whether rows have a mean or a direction that is much larger than the rest, or features that are alike."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=draw)
    if kind == "mean":
        x = x + 1e3 * torch.randn(features, generator=draw)
    if kind == "direction":
        x = x + 1e3 * torch.outer(torch.randn(rows, generator=draw), torch.randn(features, generator=draw))
    if kind == "alike":
        x = x[:, :4].repeat(1, -(-features // 4))[:, :features] + 1e-4 * x
    x = x.double()
    y = x @ torch.randn(features, 3, generator=draw).double() / features**0.5 + torch.randn(rows, 3, generator=draw)
    return torch.cat([x, torch.ones(rows, 1).double()], 1), y


@pytest.mark.parametrize("kind", ["plain", "mean", "direction", "alike"])
@pytest.mark.parametrize(("rows", "features"), [(60, 90), (80, 70), (700, 70), (600, 300)])
def test_it_is_the_readable_form(rows, features, kind, monkeypatch):
    """More features than rows, fewer, and fewer than all rows but more than without those held out."""
    z, y = sample(rows, features, kind)
    out = held_out(rows)
    wanted, predicted = exact_fit(z, y, out)
    assert fast_fit(z, y, out) is not None or kind == "direction", "which is for float64, where it is large against the penalty"
    monkeypatch.setattr(module, "LARGE", 8)
    found = ridge_fit(z, y)
    # compared as predictions: where features are alike, coefficients are as good as free
    for mine, other in ((z @ found[0], z @ wanted), (found[1], predicted)):
        assert float((mine - other).norm() / (other - other.mean(0)).norm()) < 1e-7


def test_one_that_rounding_breaks_is_solved_the_other_way(monkeypatch):
    z, y = sample(60, 90, "plain")
    monkeypatch.setattr(module, "LARGE", 8)
    monkeypatch.setattr(module, "CORRECTIONS", 0)
    assert fast_fit(z, y, held_out(60)) is None
    assert torch.equal(ridge_fit(z, y)[0], exact_fit(z, y, held_out(60))[0])
    monkeypatch.undo()
    monkeypatch.setattr(module, "LARGE", 8)
    monkeypatch.setattr(module, "exact_fit", None)
    assert ridge_fit(z, y)[0].shape == (91, 3)
    broken = z.clone()
    broken[0, 0] = float("nan")
    assert fast_fit(broken, y, held_out(60)) is None
