"""Experts that share weights: groups, alignment, what works and what is refused."""

from __future__ import annotations

import pytest
import torch

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.compress.changes import change_of
from moe_prism.compress.merge.change import MergeChange
from moe_prism.compress.merge.groups import MergedExperts, aligned, orders_bytes
from moe_prism.errors import CorruptError, UsageError
from moe_prism.methods.find import method
from moe_prism.methods.merge.base import routed_layers
from moe_prism.methods.merge.m_smoe import dominant
from moe_prism.model import find_layers
from moe_prism.point import WeightChange
from tests.compress.tiny import IDS, build, logits, relative


@pytest.fixture(scope="module", params=["softmax", "router-bias"])
def model(request):
    return build(request.param)


def values_of(model, ids=IDS):
    work = Pass(model, find_layers(model), Settings(collectors=("counts", "pairs"), batch=2))
    work.run(ids)
    return work


@torch.no_grad()
def test_pairs_are_counted_and_merge(model):
    layers = find_layers(model)
    seen = [[] for _ in layers]
    for layer, rows in zip(layers, seen, strict=True):
        layer.install(lambda x, i, w, rows=rows, layer=layer: rows.append(i.clone()) or layer.stock(x, i, w))
    model(input_ids=IDS, use_cache=False)
    for layer in layers:
        layer.uninstall()
    whole, parts = values_of(model), [values_of(model, ids) for ids in (IDS[:1], IDS[1:])]
    for number, (layer, rows) in enumerate(zip(layers, seen, strict=True)):
        wanted = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.int64)
        for row in torch.cat(rows).tolist():
            for a in row:
                for b in row:
                    wanted[a, b] += 1
        mine = whole.collectors[number]["pairs"]
        assert torch.equal(mine.values["together"], wanted) and int(mine.values["scored_tokens"]) == IDS.numel()
        parts[0].collectors[number]["pairs"].merge(parts[1].collectors[number]["pairs"].state())
        for key, value in mine.state().items():
            torch.testing.assert_close(parts[0].collectors[number]["pairs"].state()[key], value, rtol=1e-4, atol=1e-3)


def change(model, name):
    layers = find_layers(model)
    values = [own.values for own in values_of(model).statistics().layers]
    text = name.partition(":")[2]
    return method(name).change(routed_layers(model, layers, values), float(text.partition(":")[0].removeprefix("keep=")))


def test_the_model_comes_back_and_so_does_the_plain_form(model):
    before, weights = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    layers, found = find_layers(model), change(model, "m-smoe:keep=0.5")
    with found.installed(model, layers):
        assert relative(logits(model), before) > 1e-3
        for layer, own in zip(layers, found.layers, strict=True):
            for members in own.members():
                assert all(torch.equal(layer.down[e], layer.down[members[0]]) for e in members)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters()) and torch.equal(logits(model), before)
    assert change_of(WeightChange.from_json(found.part().to_json())) == found
    assert found.resident_share == 0.5 and change(model, "m-smoe:keep=1").resident_share == 1
    with change(model, "m-smoe:keep=1").installed(model, layers):
        assert torch.equal(logits(model), before)


def test_a_permuted_copy_is_merged_without_a_loss(model):
    layers = find_layers(model)
    layer = layers[0]
    saved = {name: p.detach().clone() for name, p in model.named_parameters()}
    perm = torch.randperm(layer.width, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for view in (layer.gate, layer.up, layer.down.transpose(1, 2), layer.gate_bias, layer.up_bias):
            if view is not None:
                view[5] = view[2][perm]
        if layer.down_bias is not None:
            layer.down_bias[5] = layer.down_bias[2]
    before = logits(model)
    groups = torch.arange(layer.num_experts)
    groups[5] = 2
    alone = MergedExperts(layer.width, tuple(range(layer.num_experts)), (1.0,) * layer.num_experts)
    one = MergedExperts(layer.width, tuple(groups.tolist()), (1.0,) * layer.num_experts, orders_bytes(aligned(layer, groups)))
    with MergeChange((one, *[alone] * (len(layers) - 1))).installed(model, layers):
        assert relative(logits(model), before) < 1e-5
    blind = MergedExperts(layer.width, one.groups, one.weights)
    with MergeChange((blind, *[alone] * (len(layers) - 1))).installed(model, layers):
        assert relative(logits(model), before) > 1e-3
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(saved[name])


def test_the_most_used_stand_for_the_others_at_least_one_in_every_layer():
    counts = [torch.tensor([10.0, 30, 0, 60]), torch.tensor([25.0, 25, 25, 25])]
    assert [mask.tolist() for mask in dominant(counts, 0.5)] == [[False, True, False, True], [True, True, False, False]]
    assert [int(mask.sum()) for mask in dominant(counts, 0.01)] == [1, 1]


def test_groups_that_are_none_are_refused():
    for groups, weights in (((1, 0), (1.0, 1.0)), ((0, 5), (1.0, 1.0)), ((0, 0), (0.0, 0.0)), ((0, 1), (1.0,))):
        with pytest.raises(CorruptError):
            row = {"neurons": 4, "groups": list(groups), "weights": list(weights), "orders": ""}
            MergeChange.from_settings({"layers": [row]})
    with pytest.raises(CorruptError, match="no order"):
        MergedExperts(2, (0,), (1.0,), orders_bytes(torch.tensor([[1, 1]]))).check("here")
    with pytest.raises(CorruptError, match="no base64"):
        MergedExperts.orders_of("!", "here")
    with pytest.raises(UsageError, match="other experts"):
        MergeChange((MergedExperts(4, (0, 0), (1.0, 1.0)),)).check_fits(find_layers(build("softmax")))
