"""Weights read in the type they are stored in: float32 rows times bfloat16 weights, which is float32 altogether, and bfloat16 rows."""

import pytest
import torch

from moe_prism.artefact.load import load
from moe_prism.elastic import LayerParts, operating_point
from moe_prism.elastic.execute import times
from moe_prism.elastic.execute.base import Settled
from moe_prism.elastic.execute.memory import InMemory
from moe_prism.elastic.execute.plain import reference, whole_experts
from moe_prism.elastic.scorers.ridge import Ridge
from moe_prism.jobs.refactor import RefactorOptions, refactor
from moe_prism.model import find_layers, load_model
from moe_prism.model.widen import stays_narrow, widen
from tests.parity.families import build
from tests.tiny_sources import save_tiny

from .test_execute import batch, close

TOKENS = (1, 40)


@pytest.fixture(scope="module")
def layers():
    """The same layer with bfloat16 weights, and with the same numbers in float32."""
    narrow = find_layers(build("olmoe").to(torch.bfloat16))[0]
    wide = find_layers(build("olmoe").to(torch.bfloat16).float())[0]
    for layer in (narrow, wide):
        layer.arrange()
    return narrow, wide


@torch.no_grad()
@pytest.mark.parametrize("tokens", TOKENS)
def test_bfloat16_rows_are_computed_in_float32_and_rounded_once(layers, tokens):
    narrow, wide = (LayerParts(layer, 4, 0) for layer in layers)
    x, index, weight, g = batch(narrow, tokens, 2, tokens)
    x, weight, keep = x.bfloat16(), weight.bfloat16(), torch.rand(tokens, 2, 4, generator=g) < 0.5
    rows, factors = InMemory(narrow).widened(x, weight)
    assert rows.dtype == factors.dtype == torch.float32
    expected = reference(wide, rows, index, factors, keep)
    found = reference(narrow, rows, index, factors, keep)
    close(found, expected)
    close(whole_experts(narrow, rows, index, factors, keep), expected)
    close(InMemory(narrow).run(rows, index, factors, Settled(keep)), expected)


@torch.no_grad()
@pytest.mark.parametrize("who", ["stock", "tiles"])
def test_whole_experts_of_bfloat16_rows_keep_their_type(layers, monkeypatch, who):
    monkeypatch.setenv(times.CHOICE, who)
    parts = LayerParts(layers[0], 4, 0)
    x, index, weight, _ = batch(parts, 8, 2, 0)
    x, weight = x.bfloat16(), weight.bfloat16()
    out = InMemory(parts).whole(x, index, weight)
    own = layers[0].native(x, index, weight)
    assert out.dtype == torch.bfloat16
    assert (out - own).float().norm() <= (0 if who == "stock" else 2e-2 * own.float().norm())


@torch.no_grad()
@pytest.mark.parametrize("gates", [0, 1])
@pytest.mark.parametrize("tokens", TOKENS)
def test_predicted_norms_do_not_depend_on_the_type_of_equal_weights(layers, gates, tokens):
    tensor = torch.randn(layers[0].num_experts, 4, layers[0].hidden + 4 * gates + 1, generator=torch.Generator().manual_seed(1))
    found = []
    for layer in layers:
        parts = LayerParts(layer, 4, gates, {"ridge": (tensor * 0.1).bfloat16()})
        x, index, _, _ = batch(LayerParts(layers[1], 4, 0), tokens, 2, tokens)
        found.append(Ridge(parts)(x, index))
    assert torch.equal(*found)


@torch.no_grad()
def test_a_layer_whose_experts_stay_narrow_takes_float32_rows(layers):
    model = build("olmoe").to(torch.bfloat16)
    found = find_layers(model)
    assert all(map(stays_narrow, found))
    widen(model, found)
    kinds = {p.dtype for n, p in model.named_parameters() if "experts" not in n}
    assert kinds == {torch.float32} and found[0].up.dtype == torch.bfloat16 and found[0].input_dtype == torch.float32
    x, index, weight, _ = batch(LayerParts(layers[1], 4, 0), 5, 2, 5)
    expected = layers[1].native(x, index, weight)
    for way in (found[0].native, found[0].stock):
        close(way(x, index, weight), expected)


@torch.no_grad()
def test_a_loaded_model_keeps_its_experts_as_they_are_stored_and_says_the_same(elastic_nano):
    wide, _ = load(elastic_nano, wide=True)
    model, _ = load(elastic_nano)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))} == {torch.bfloat16}
    ids = torch.randint(0, 400, (2, 33), generator=torch.Generator().manual_seed(0))
    for budget in (1.0, 0.5):
        with operating_point(wide, budget=budget), operating_point(model, budget=budget):
            expected, found = wide(ids).logits, model(ids).logits
        assert (found - expected).norm() < 1e-6 * expected.norm()


@torch.no_grad()
def test_float16_that_cannot_hold_what_experts_put_out_computes_in_float32(tmp_path, tiny_calibration):
    source = save_tiny("olmoe", tmp_path / "source", dtype=torch.float16)
    for name, weight in source.named_parameters():
        if ".experts." in name:
            weight.mul_(1500)
    source.save_pretrained(tmp_path / "source")
    ids = torch.arange(4, 36)[None]
    assert not source(ids).logits.isfinite().all()
    refactor(tmp_path / "source", tmp_path / "elastic", RefactorOptions(calibration=tiny_calibration))
    model, _ = load(tmp_path / "elastic")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = load_model(tmp_path / "source", torch.float32)(ids).logits
    assert expected.isfinite().all() and (model(ids).logits - expected).norm() < 1e-5 * expected.norm()
