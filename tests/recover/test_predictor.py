"""Training the predictor: what is trained and what is not, its gradient, and that all slots kept costs nothing."""

import json

import pytest
import torch

import moe_prism
from moe_prism.elastic import operating_point
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.execute.plain import reference
from moe_prism.errors import UsageError
from moe_prism.jobs.recover import RecoverOptions, recover_model
from moe_prism.point import FULL
from moe_prism.recover.predictor import _price, _Trained
from tests.tiny_sources import digests

OPTIONS = RecoverOptions(method="predictor", steps=4, tokens=1024, length=32)
IDS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module")
def trained(shared, elastic_tiny):
    return shared("trained-tiny", lambda out: recover_model(elastic_tiny, out, OPTIONS))


def test_only_predictor_and_levels_change(elastic_tiny, trained):
    old, new = digests(elastic_tiny), digests(trained)
    assert {name for name in new if new[name] != old.get(name)} == {"prism.json", "prism.safetensors"}
    assert moe_prism.verify(trained)
    (facts,) = json.loads((trained / "prism.json").read_text())["recovery"]
    assert (facts["method"], facts["steps"], facts["resident_bytes"]) == ("predictor", 4, 0)
    before, after = (moe_prism.load(folder)[0]._moe_prism.layers for folder in (elastic_tiny, trained))
    for a, b in zip(before, after, strict=True):
        assert {n for n in a.parts.tensors if not torch.equal(a.parts.tensors[n], b.parts.tensors[n])} == {
            "ridge",
            "cutoffs",
            "shares",
        }


@torch.no_grad()
def test_full_budget_is_the_same_model(elastic_tiny, trained):
    old, new = (moe_prism.load(folder)[0] for folder in (elastic_tiny, trained))
    assert torch.equal(old(IDS).logits, new(IDS).logits)
    with operating_point(old, 0.5), operating_point(new, 0.5):
        assert not torch.allclose(old(IDS).logits, new(IDS).logits)


@pytest.mark.parametrize("budget", [None, 0.25, 0.6])
def test_training_computes_what_serving_computes_and_has_a_gradient(elastic_tiny, budget):
    model, _ = moe_prism.load(elastic_tiny)
    model.requires_grad_(False)
    layer = model._moe_prism.layers[0]
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(30, 32, generator=g), torch.rand(30, 2, generator=g)
    index = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(30)])
    index[0, 1] = -1  # a token whose router chose one expert only
    mine = _Trained(layer)
    mine.budget = budget
    if budget is None:
        index[0, 1] = 0
        torch.testing.assert_close(mine(x, index, weight), layer.parts.layer.stock(x, index, weight))
        return
    keep = layer.kept(Step(bind(model._moe_prism, [FULL.with_slots(budget, "threshold")])), x, index, weight)
    out = mine(x, index, weight)
    torch.testing.assert_close(out, reference(layer.parts, x, index, weight, keep))
    (out.square().sum() + mine.share).backward()
    assert mine.weight.grad.abs().sum(dim=(1, 2)).min() > 0  # of every expert
    assert all(p.grad is None for p in model.parameters())


def test_the_price_is_the_slope_of_the_frontier(monkeypatch, elastic_tiny):
    """KL = exp(1 - 6 budget) exactly: a slot more saves 6 exp(1 - 6 budget)."""
    from types import SimpleNamespace

    from moe_prism.recover import predictor

    curve = lambda budget: torch.tensor(1 - 6 * budget).exp().item()  # noqa: E731
    monkeypatch.setattr(
        predictor,
        "measure",
        lambda _m, _i, points, **_: [SimpleNamespace(quality=SimpleNamespace(kl=curve(p.slots.budget))) for p in points],
    )
    price = _price(SimpleNamespace(ids=torch.zeros(8, 4), model=None, elastic=None))
    for budget in (0.3, 0.5, 0.9):
        assert price(budget) == pytest.approx(6 * curve(budget), rel=1e-4)


def test_same_seed_same_bytes_and_predictor_before_repair(elastic_tiny, trained, tmp_path):
    recover_model(elastic_tiny, tmp_path / "again", OPTIONS)
    assert digests(tmp_path / "again") == digests(trained)
    recover_model(trained, tmp_path / "both", RecoverOptions(tokens=1024, length=32))
    steps = json.loads((tmp_path / "both" / "prism.json").read_text())["recovery"]
    assert [step["method"] for step in steps] == ["predictor", "repair"]
    with pytest.raises(UsageError, match="train the predictor first"):
        recover_model(elastic_tiny_repaired(elastic_tiny, tmp_path), tmp_path / "out", OPTIONS)


def elastic_tiny_repaired(elastic_tiny, tmp_path):
    recover_model(elastic_tiny, tmp_path / "repaired", RecoverOptions(tokens=1024, length=32))
    return tmp_path / "repaired"
