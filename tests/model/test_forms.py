"""Experts without the experts interface: their seams, their views, and their routers. Parity itself: tests/parity."""

from __future__ import annotations

import copy

import pytest
import torch

from moe_prism.errors import UsageError
from moe_prism.model import MoELayer, find_layers
from moe_prism.model.families import WITHOUT_INTERFACE, installed_families
from moe_prism.model.router import Router, find_routers

from ..parity.checks import output
from ..parity.families import OVERRIDES, build

CALLED_WITH_IDS = ("dbrx", "step3p7")


@pytest.fixture(params=WITHOUT_INTERFACE)
def family(request: pytest.FixtureRequest) -> str:
    if request.param not in installed_families():
        pytest.skip("not in this version of transformers")
    return request.param


def nothing(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def test_the_function_is_called_and_the_module_is_restored(family: str) -> None:
    model = build(family)
    before = output(model)
    layers = find_layers(model)
    assert torch.equal(output(model), before)  # finding changes no result
    attributes = [set(layer.module.__dict__) for layer in layers]
    for layer in layers:
        layer.install(nothing)
        layer.install(nothing)  # an observer takes the place of the one before
    assert not torch.allclose(output(model), before)
    for layer in layers:
        layer.uninstall()
        layer.uninstall()
    assert [set(layer.module.__dict__) for layer in layers] == attributes
    assert torch.equal(output(model), before)


def test_a_forward_that_another_library_put_there_comes_back(family: str) -> None:
    layer = find_layers(build(family))[0]
    layer.module.forward = theirs = lambda *args: None
    layer.install(nothing)
    assert layer.module.forward is not theirs
    layer.uninstall()
    assert layer.module.forward is theirs


def test_stock_in_the_seam_is_the_model(family: str) -> None:
    model = build(family)
    before = output(model)
    for layer in find_layers(model):
        layer.install(layer.stock)
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)


def test_ids_that_are_no_expert_add_nothing(family: str) -> None:
    layer = find_layers(build(family))[0]
    x = torch.randn(5, layer.hidden, generator=torch.Generator().manual_seed(4))
    index, weight = torch.arange(10).reshape(5, 2) % layer.num_experts, torch.rand(5, 2)
    kept = layer.stock(x, index[:, :1], weight[:, :1])
    for none in (-1, layer.num_experts):
        index[:, 1] = none
        torch.testing.assert_close(layer.stock(x, index, weight), kept)


def test_views_alias_the_weights_and_survive_arrange(family: str) -> None:
    model = build(family)
    layer = find_layers(model)[0]
    before = output(model)
    layer.arrange()
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)
    e, d, f = layer.num_experts, layer.hidden, layer.width
    assert layer.up.shape == (e, f, d) and layer.down.shape == (e, d, f)
    if family != "switch_transformers":
        assert layer.down.transpose(1, 2).stride()[1:] == (d, 1)  # neuron by neuron
    with torch.no_grad():
        for value, view in enumerate((layer.gate, layer.up, layer.down), start=2):
            if view is not None:
                view.fill_(value)
    filled = sum(int((p == value).sum()) for p in layer.module.parameters() for value in (2, 3, 4))
    assert filled == (2 if layer.gate is None else 3) * e * d * f


def test_owners_hold_the_experts_and_nothing_else(family: str) -> None:
    model = build(family)
    layer = find_layers(model)[0]
    held = sum(p.numel() for name in layer.owners for p in model.get_submodule(name).parameters())
    unused = len(layer.extra or ()) * 2 * layer.width * layer.hidden  # LongCat-Flash has rows for its copies
    assert held == layer.num_experts * layer.parameters_per_expert() + unused


def test_separate_experts_follow_a_change_of_type() -> None:
    """Converting a model gives every expert a tensor of its own again."""
    model = build("switch_transformers")
    layer = find_layers(model)[0]
    model.double()
    before = output(model)
    layer.down.zero_()
    assert layer.down.dtype == torch.float64 and not torch.allclose(output(model), before)


def test_separate_experts_are_saved_under_their_own_names(tmp_path) -> None:
    model = build("switch_transformers")
    find_layers(model)[0].arrange()
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_a_token_without_capacity_has_no_expert() -> None:
    model = build("switch_transformers")
    seen: list[torch.Tensor] = []

    def record(layer: MoELayer):
        return lambda x, index, weight: (seen.append(index), layer.stock(x, index, weight))[1]

    for layer in find_layers(model):
        layer.install(record(layer))
    output(model)
    assert any((index == -1).any() for index in seen) and all(index.shape[1] == 1 for index in seen)


def test_llama4_with_two_experts_per_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OVERRIDES["llama4"], "num_experts_per_tok", 2)
    with pytest.raises(UsageError, match=r"feed_forward\.experts.*multiplies the inputs of its experts.*a token has 2"):
        find_layers(build("llama4"))


def test_longcat_experts_that_are_not_copies_are_refused() -> None:
    model = build("longcat_flash")
    model.model.layers[0].mlp.experts.identity_expert = torch.nn.Tanh()
    with pytest.raises(UsageError, match="its experts from 8 on are not copies"):
        find_layers(model)


def test_longcat_adds_its_copies_whatever_is_installed() -> None:
    layer = find_layers(build("longcat_flash"))[0]
    assert layer.extra is not None and layer.extra.kinds == ("copy",) * 3
    x, index = torch.randn(4, layer.hidden), torch.tensor([[0, 8], [9, 10], [1, 2], [10, 7]])
    weight = torch.rand(4, 2)
    expected = layer.module(x, index, weight)
    layer.install(nothing)
    torch.testing.assert_close(layer.module(x, index, weight), x * (weight * (index >= 8)).sum(1, keepdim=True))
    layer.install(layer.native)
    torch.testing.assert_close(layer.module(x, index, weight), expected)


@pytest.mark.parametrize("family", CALLED_WITH_IDS)
def test_routers_that_are_called_with_ids_can_be_sliced_and_masked(family: str) -> None:
    model = build(family)
    layers = find_layers(model)
    find_routers(model, layers)  # checked on random inputs
    router, kept = Router(model, layers[0]), [1, 4, 6]
    x = torch.randn(40, layers[0].hidden, generator=torch.Generator().manual_seed(5))
    for mode in (router.sliced, router.masked):
        with mode(kept):
            index, _ = router.route(x)
        assert set(index.unique().tolist()) == set(kept)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("longcat_flash", "also chooses among 3 experts that hold no matrices"),
        ("jetmoe", "not called with ids"),
        ("llama4", "not called with ids"),
        ("switch_transformers", "not called with ids"),
    ],
)
def test_routers_that_cannot_be_sliced_say_why(family: str, words: str) -> None:
    model = build(family)
    with pytest.raises(UsageError, match=words):
        find_routers(model, find_layers(model))
