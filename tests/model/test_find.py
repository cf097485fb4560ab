"""Finding layers: what is refused and how it is said, and the views of every storage layout."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from moe_prism.errors import UsageError
from moe_prism.model import ExpertLayout, MoELayer, find_layers

from ..parity.checks import output
from ..parity.families import GENERIC, NOT_TAKEN, build, randomise

OUTSIDE = {
    # family that is not taken: (model class, settings)
    "doge": ("DogeForCausalLM", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}),
    "nllb_moe": (
        "NllbMoeModel",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    ),
    "vitpose_backbone": ("VitPoseBackbone", {"num_experts": 2, "part_features": 8}),
}

LAYOUTS = {
    "olmoe": ExpertLayout(),
    "aria": ExpertLayout(is_transposed=True),
    "gpt_oss": ExpertLayout(is_concatenated=False, is_transposed=True, has_bias=True),
    "openai_privacy_filter": ExpertLayout(is_transposed=True, has_bias=True),
    "nemotron_h": ExpertLayout(has_gate=False),
}


def outside(family: str) -> nn.Module:
    name, settings = OUTSIDE[family]
    cls = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    known = set(cls.config_class().to_dict())
    model = cls(cls.config_class(**{k: v for k, v in GENERIC.items() if k in known} | settings))
    randomise(model)
    return model


@pytest.mark.parametrize("dense", [None, False])
@pytest.mark.parametrize("family", NOT_TAKEN)
def test_experts_that_are_not_taken_are_refused_by_name(family: str, dense: bool | None) -> None:
    with pytest.raises(UsageError) as caught:
        find_layers(outside(family), dense=dense)
    assert NOT_TAKEN[family][0] in caught.value.cause
    assert "module '" in caught.value.cause
    assert "3-D tensors" in caught.value.next_step


class Mlp(nn.Module):
    """A dense MLP that `find_layers` accepts."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj, self.act_fn = nn.Linear(8, 16), nn.Linear(16, 8), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


def test_a_list_of_experts_is_not_taken_for_dense_mlps() -> None:
    block = nn.Module()
    block.experts = nn.ModuleList(Mlp() for _ in range(4))
    with pytest.raises(UsageError, match="holds experts in an unknown form"):
        find_layers(nn.Sequential(block))


def test_a_model_without_mlp() -> None:
    with pytest.raises(UsageError, match="Sequential has no MoE layer and no dense MLP"):
        find_layers(nn.Sequential(nn.Linear(4, 4)))


class Doubled(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Broken(Mlp):
    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return super().forward(x + other)


class Pair(Mlp):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


@pytest.mark.parametrize(
    ("module", "words"), [(Doubled, "its output is not"), (Broken, "could not be called"), (Pair, "could not be called")]
)
def test_a_different_formula_is_refused(module: type[Mlp], words: str) -> None:
    with pytest.raises(UsageError, match=rf"module '0' \({module.__name__}\): .*{words}"):
        find_layers(nn.Sequential(module()))


def test_f08_weights_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(Mlp())
    model[0].down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(UsageError, match="NaN or infinite"):
        find_layers(model)


def test_quantized_experts_are_refused() -> None:
    model = build("olmoe")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.experts.*float8_e4m3fn"):
        find_layers(model)


def test_a_norm_after_each_expert_is_refused() -> None:
    model = build("olmoe")
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    with pytest.raises(UsageError, match="normalizes the output of each expert"):
        find_layers(model)


@pytest.fixture(params=LAYOUTS)
def laid_out(request: pytest.FixtureRequest) -> tuple[MoELayer, ExpertLayout]:
    return find_layers(build(request.param))[0], LAYOUTS[request.param]


def test_view_shapes(laid_out: tuple[MoELayer, ExpertLayout]) -> None:
    layer, layout = laid_out
    e, d, f = layer.num_experts, layer.hidden, layer.width
    assert (e, d, f) == (8, 32, 16)
    assert layer.layout == layout
    assert layer.up.shape == (e, f, d)
    assert layer.down.shape == (e, d, f)
    assert (layer.gate is None) == (not layout.has_gate)
    assert layer.gate is None or layer.gate.shape == (e, f, d)
    if layout.has_bias:
        assert layer.gate_bias.shape == layer.up_bias.shape == (e, f)
        assert layer.down_bias.shape == (e, d)
    else:
        assert layer.gate_bias is layer.up_bias is layer.down_bias is None


def test_views_alias_the_weights(laid_out: tuple[MoELayer, ExpertLayout]) -> None:
    layer, layout = laid_out
    views = {"gate": layer.gate, "up": layer.up, "down": layer.down, "gate_bias": layer.gate_bias, "up_bias": layer.up_bias}
    parameters = dict(layer.module.named_parameters(recurse=False))
    owners = {name: [p for p in parameters.values() if _shares(view, p)] for name, view in views.items() if view is not None}
    assert all(len(found) == 1 for found in owners.values())
    with torch.no_grad():
        for value, view in enumerate((layer.gate, layer.up, layer.down), start=1):
            if view is not None:
                view.fill_(value)
    first = layer.module.gate_up_proj if layout.has_gate else layer.module.up_proj
    assert {1, 2} >= set(first.unique().tolist()) >= {2}
    assert (layer.module.down_proj == 3).all()
    if layout.has_gate:
        assert (first == 1).sum() == (first == 2).sum() == first.numel() // 2
        assert (layer.gate == 1).all() and (layer.up == 2).all()


def _shares(view: torch.Tensor, parameter: torch.Tensor) -> bool:
    return view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def test_blocks_add_up_to_the_expert(laid_out: tuple[MoELayer, ExpertLayout]) -> None:
    layer, _ = laid_out
    x = torch.randn(5, layer.hidden, generator=torch.Generator().manual_seed(0))
    for e in range(layer.num_experts):
        whole = layer.project(e, layer.activations(e, x))
        parts = [slice(i, i + 4) for i in range(0, layer.width, 4)]
        torch.testing.assert_close(
            sum(layer.project(e, layer.activations(e, x, s), s) for s in parts), whole, rtol=1e-5, atol=1e-4
        )


def test_permutation_is_undone_by_its_inverse(laid_out: tuple[MoELayer, ExpertLayout]) -> None:
    layer, _ = laid_out
    before = copy.deepcopy(layer.module.state_dict())
    perm = torch.stack(
        [torch.randperm(layer.width, generator=torch.Generator().manual_seed(e)) for e in range(layer.num_experts)]
    )
    layer.permute(perm)
    assert any(not torch.equal(w, before[name]) for name, w in layer.module.state_dict().items())
    layer.permute(perm.argsort(1))
    assert all(torch.equal(w, before[name]) for name, w in layer.module.state_dict().items())


@pytest.mark.parametrize("bad", [torch.zeros(8, 16), torch.arange(16).expand(4, 16), torch.arange(15).expand(8, 15)])
def test_what_is_no_permutation_changes_nothing(bad: torch.Tensor) -> None:
    layer = find_layers(build("olmoe"))[0]
    before = copy.deepcopy(layer.module.state_dict())
    with pytest.raises(ValueError, match="expected permutations of 16 neurons"):
        layer.permute(bad)
    assert all(torch.equal(w, before[name]) for name, w in layer.module.state_dict().items())


def zero(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def test_layers_are_hooked_one_by_one() -> None:
    """The layers share a config; uninstalling one leaves the others hooked, the last gives the config back."""
    model = build("olmoe")
    model.config._experts_implementation = "batched_mm"
    first, second, *_ = find_layers(model)
    plain = output(model)
    first.install(zero)
    one = output(model)
    second.install(zero)
    both = output(model)
    assert not torch.allclose(plain, one) and not torch.allclose(one, both)
    second.uninstall()
    assert torch.equal(output(model), one)
    first.uninstall()
    assert model.config._experts_implementation == "batched_mm"
    assert torch.equal(output(model), plain)
    first.uninstall()  # a second time does nothing
    assert model.config._experts_implementation == "batched_mm"


def test_the_hook_leaves_no_trace_in_the_saved_config(tmp_path) -> None:
    model = build("olmoe")
    before = model.config.to_dict()
    layers = find_layers(model)
    for layer in layers:
        layer.install(zero)
    assert model.config.to_dict() == before
    assert set(model.state_dict()) == set(build("olmoe").state_dict())


def test_a_module_as_function_does_not_join_the_model() -> None:
    class Zero(nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    model = build("olmoe")
    count = len(list(model.modules()))
    layer = find_layers(model)[0]
    layer.install(Zero())
    output(model)
    assert len(list(model.modules())) == count
    layer.uninstall()
