"""Neurons that go: one description in memory and in JSON, budgets, protection, and prices."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_prism.compress.changes import change_of
from moe_prism.compress.slice.change import SliceChange
from moe_prism.compress.slice.choose import SliceRequest, choose_neurons, equal_width
from moe_prism.compress.slice.kept import KeptNeurons
from moe_prism.compress.slice.mask import per_neuron
from moe_prism.compress.slice.protect import shields
from moe_prism.errors import CorruptError, UsageError
from moe_prism.model import find_layers
from moe_prism.point import WeightChange
from tests.compress.tiny import FAMILIES, build, logits, relative


def masks(layers, share=0.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(layer.num_experts, layer.width, generator=g) < share for layer in layers]


@pytest.mark.parametrize("kind", FAMILIES)
def test_zeros_are_the_function_without_the_neurons_and_leave_no_trace(kind):
    model = build(kind)
    layers = find_layers(model)
    kept = masks(layers)
    before, weights = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    change = SliceChange.of(kept)
    with change.installed(model, layers):
        found = logits(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), before) and relative(found, before) > 1e-3

    def without(layer, mask):
        def experts(x, index, weight):
            out = torch.zeros_like(x)
            for t, c in itertools.product(range(len(x)), range(index.shape[1])):
                e = int(index[t, c])
                ids = mask[e].nonzero().flatten()
                y = layer.activations(e, x[t : t + 1], ids) @ layer.down[e][:, ids].T
                out[t] += weight[t, c] * (y[0] if layer.down_bias is None else y[0] + layer.down_bias[e])
            return out

        return experts

    with torch.no_grad():
        for layer, mask in zip(layers, kept, strict=True):
            layer.install(without(layer, mask))
        wanted = logits(model)
    for layer in layers:
        layer.uninstall()
    assert relative(found, wanted) < 1e-5


def test_the_plain_form_comes_back_and_bad_ones_are_refused():
    layers = find_layers(build("softmax"))
    change = SliceChange.of(masks(layers))
    part = change.part()
    assert change_of(WeightChange.from_json(part.to_json())) == change
    assert change.resident_share == pytest.approx(sum(m.float().mean() for m in masks(layers)) / len(layers))
    row = change.settings()["layers"][0]
    for wrong in ({"kept": "!"}, {"kept": row["kept"][:-4]}, {"neurons": 15, "kept": row["kept"]}, {"experts": 0}, {"more": 1}):
        with pytest.raises(CorruptError):
            SliceChange.from_settings({"layers": [{**row, **wrong}]})
    with pytest.raises(CorruptError):  # bits beyond the last neuron
        KeptNeurons.from_text(1, 3, "/w==", "here")
    with pytest.raises(UsageError, match="other experts"):
        SliceChange(change.kept[:1]).masks(layers)


def shares(found):
    return [float(mask.float().mean()) for mask in found]


def test_budgets_are_met_and_the_best_stay():
    g = torch.Generator().manual_seed(1)
    scores = [torch.rand(4, 24, generator=g, dtype=torch.float64) * scale for scale in (1.0, 3.0)]
    free = [torch.zeros(4, 24, dtype=torch.bool)] * 2
    every = torch.cat([s.flatten() for s in scores])
    of_model = choose_neurons(scores, SliceRequest(0.5), free)
    limit = every.sort(descending=True).values[len(every) // 2 - 1]
    assert all(torch.equal(mask, own >= limit) for mask, own in zip(of_model, scores, strict=True))
    of_layer = choose_neurons(scores, SliceRequest(0.5, "layer"), free)
    assert shares(of_layer) == [0.5, 0.5] and float(scores[0][of_layer[0]].min()) >= float(scores[0][~of_layer[0]].max())
    own = choose_neurons(scores, SliceRequest(0.5, "layer", shares=(0.25, 0.75)), free)
    assert shares(own) == [0.25, 0.75]
    even = choose_neurons(scores, SliceRequest(0.6, "expert", multiple=8), free)
    assert {int(n) for mask in even for n in mask.sum(1)} == {16} == {equal_width(24, 0.6, 8)}
    for multiple in (5, 8):
        found = choose_neurons(scores, SliceRequest(0.5, "model", multiple), free)
        assert all(int(n) % multiple in (0, 24 % multiple) for mask in found for n in mask.sum(1))
        assert abs(sum(shares(found)) / 2 - 0.5) <= multiple / every.numel()
        for mask, own in zip(found, scores, strict=True):  # within an expert the best stay
            for kept, row in zip(mask, own, strict=True):
                assert not kept.any() or kept.all() or float(row[kept].min()) >= float(row[~kept].max())
    assert all(
        mask.all() for scope in ("model", "layer", "expert") for mask in choose_neurons(scores, SliceRequest(1.0, scope), free)
    )


def test_what_is_protected_stays_whatever_it_scores():
    layers = find_layers(build("softmax"))
    scores = [torch.arange(layer.num_experts * layer.width).view(layer.num_experts, -1).double() for layer in layers]
    found = shields(layers, [], [], [(1, 0)])
    for scope in ("model", "layer"):
        kept = choose_neurons(scores, SliceRequest(0.5, scope), found)
        assert kept[1][0].all() and not kept[0][0].any() and sum(shares(kept)) == pytest.approx(1.0)
    with pytest.raises(UsageError, match="8 of the protected neurons would not stay"):
        choose_neurons(scores, SliceRequest(0.5, "expert"), found)
    with pytest.raises(UsageError, match="there is no expert 1:8"):
        shields(layers, [], [], [(1, 8)])
    for request, words in ((SliceRequest(0.0), "outside"), (SliceRequest(0.5, multiple=17), "multiples of 17")):
        with pytest.raises(UsageError, match=words):
            choose_neurons(scores, request, found)


def test_every_view_of_a_neuron_is_a_view():
    """gpt-oss: interleaved rows, transposed matrices, biases."""
    layer = find_layers(build("router-bias"))[0]
    assert len(per_neuron(layer)) == 5
    for view in per_neuron(layer):
        with torch.no_grad():
            view[0, 3] = 7
    assert all((view[0, 3] == 7).all() for view in per_neuron(layer))
