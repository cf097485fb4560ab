"""Rankings of neurons against what they stand for: matrices that need not be built, errors that can be measured, gradients of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.errors import UsageError
from moe_prism.methods.find import method
from moe_prism.methods.neurons.base import FLOOR, LayerSeen
from moe_prism.model import find_layers
from tests.compress.tiny import build

IDS = torch.randint(3, 64, (24, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def seen():
    """(model, what a pass says of each layer)."""
    model = build("softmax")
    layers = find_layers(model)
    work = Pass(model, layers, Settings(collectors=("neurons", "gradients")))
    work.run(IDS)
    return model, [LayerSeen(layer, own.values) for layer, own in zip(layers, work.statistics().layers, strict=True)]


def scores(name, layer):
    return method(name).judge(layer)[0]


def test_heapr_needs_no_matrix(seen):
    """E[a²] dᵀ M d with M = E[g gᵀ], g the gradient at the expert's own output: the published form, built here."""
    model, layers = seen
    outputs = [[] for _ in layers]
    for layer, kept in zip(layers, outputs, strict=True):

        def experts(x, index, weight, own=layer.layer, kept=kept):
            total = torch.zeros_like(x)
            for e in range(own.num_experts):
                token, choice = torch.where(index == e)
                if len(token):
                    a = own.activations(e, x[token])
                    out = own.project(e, a)
                    out.retain_grad()
                    kept.append((e, a.detach(), out))
                    total = total.index_add(0, token, out * weight[token, choice, None])
            return total

        layer.layer.install(experts)
    logits = model(input_ids=IDS, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    for layer, kept in zip(layers, outputs, strict=True):
        layer.layer.uninstall()
        mine = scores("heapr", layer)
        for e, a, out in kept:
            slopes = out.grad.double()
            if len(slopes) < FLOOR:
                continue
            curvature = slopes.T @ slopes / len(slopes)
            down = layer.layer.down[e].detach().double()
            wanted = a.double().square().mean(0) * torch.einsum("dj,dc,cj->j", down, curvature, down)
            torch.testing.assert_close(mine[e], wanted, rtol=1e-5, atol=1e-5 * float(wanted.max()))
    weights = [layer.layer.module.down_proj.grad for layer in layers]
    for layer, slope in zip(layers, weights, strict=True):  # SlimMoE's w ∂L/∂w, summed over a column
        wanted = (layer.layer.down.detach() * slope).double().sum(1).abs()
        torch.testing.assert_close(scores("slim", layer), wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))
    model.zero_grad()


@torch.no_grad()
def test_camera_without_peaks_is_the_squared_error_of_the_layer(seen):
    model, layers = seen
    first = layers[0].layer
    given = []
    handle = first.module.register_forward_pre_hook(
        lambda _m, args, kwargs: given.append([*args, *kwargs.values()][:3]), with_kwargs=True
    )
    model(input_ids=IDS, use_cache=False)
    handle.remove()
    x, index, weight = given[0]
    whole, energy = first.stock(x, index, weight), scores("camera:alpha=0", layers[0])
    for e, j in ((0, 3), (5, 7)):
        column = first.down[e, :, j].clone()
        first.down[e, :, j] = 0
        error = float((whole - first.stock(x, index, weight)).double().square().sum())
        first.down[e, :, j] = column
        assert float(energy[e, j]) == pytest.approx(error, rel=1e-4)
    mixed, peak = scores("camera", layers[0]), scores("camera:alpha=1", layers[0])
    torch.testing.assert_close(mixed, 0.1 * energy + 0.9 * peak)


def test_an_expert_that_was_hardly_seen_counts_like_its_layer(seen):
    _, layers = seen
    values = {name: {key: value.clone() for key, value in own.items()} for name, own in layers[0].values.items()}
    for own in values.values():
        for key, value in own.items():
            if key != "tokens":
                value[2] = 0
        assert int(own["count"].max()) > FLOOR
    layer = replace(layers[0], values=values)
    count = values["neurons"]["count"].double()
    mean = layer.mean("neurons", "sq")
    torch.testing.assert_close(mean[2], values["neurons"]["sq"].sum(0) / count.sum())
    often = int(count.argmax())
    torch.testing.assert_close(mean[often], values["neurons"]["sq"][often] / count[often])
    assert (scores("heapr", layer)[2] > 0).all() and not scores("heapr:total=true", layer)[2].any()


def test_wanda_gives_layers_with_outliers_more(seen):
    _, layers = seen
    layer = layers[0]
    norms = layer.values["neurons"]["sq"].sqrt()
    torch.testing.assert_close(scores("wanda", layer), layer.layer.down.detach().abs().double().sum(1) * norms)
    weights = layer.layer.down.detach().abs() * norms[:, None].float()
    assert method("wanda").evidence(layer) == pytest.approx(float((weights > 5 * weights.mean()).float().mean()))
    wanda = method("wanda")
    shares = wanda.shares([0.0, 0.02, 0.01], 0.75)
    assert shares == pytest.approx((0.67, 0.83, 0.75)) and wanda.shares([0.1, 0.1], 0.75) is None
    assert max(wanda.shares([0.0, 1.0], 0.97)) <= 1 and method("wanda:owl=false").shares([0.0, 0.02], 0.75) is None


def test_size_is_that_of_rows_and_column(seen):
    _, layers = seen
    own = layers[0].layer
    wanted = own.gate[1, 4].norm() * own.up[1, 4].norm() * own.down[1, :, 4].norm()
    assert float(scores("magnitude", layers[0])[1, 4]) == pytest.approx(float(wanted.detach()), rel=1e-5)
    draws = [scores(f"random-neurons:seed={seed}", layers[0]) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_statistics_that_are_missing_are_named(seen):
    _, layers = seen
    with pytest.raises(UsageError, match="the calibration holds no 'gradients'"):
        scores("heapr", replace(layers[0], values={"neurons": layers[0].values["neurons"]}))
