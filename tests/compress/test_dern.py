"""Neurons of experts that go: where they move, what they become, and what the change says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from moe_prism.compress.changes import change_of
from moe_prism.compress.merge.cluster import Clustering, clusters, homes
from moe_prism.compress.merge.rehome import RehomeChange, RehomedNeurons
from moe_prism.compress.prune import KeptExperts, pruned
from moe_prism.errors import CorruptError, UsageError
from moe_prism.methods.find import method
from moe_prism.methods.merge.base import routed_layers
from moe_prism.model import find_layers
from moe_prism.point import WeightChange
from tests.compress.test_merge import values_of
from tests.compress.tiny import EXPERTS, build, logits, relative


@pytest.fixture(scope="module", params=["softmax", "router-bias"])
def model(request):
    return build(request.param)


def change(model, name, shields=()):
    layers = find_layers(model)
    values = [own.values for own in values_of(model).statistics().layers]
    found = method(name)
    return found.change(routed_layers(model, layers, values), found.parameters.keep, shields)


def without(expert: int) -> KeptExperts:
    return KeptExperts(EXPERTS, tuple(e for e in range(EXPERTS) if e != expert))


@torch.no_grad()
@pytest.mark.parametrize("seeds", ["gate", "own", "random"])
def test_a_dropped_copy_changes_nothing_in_what_it_was_copied_from(model, seeds):
    """Its neurons, in whatever order, come back to those that they are copies of."""
    layers = find_layers(model)
    layer, saved = layers[0], {name: p.detach().clone() for name, p in model.named_parameters()}
    perm = torch.randperm(layer.width, generator=torch.Generator().manual_seed(3))
    for view in (layer.gate, layer.up, layer.down.transpose(1, 2), layer.gate_bias, layer.up_bias):
        if view is not None:
            view[5] = view[2][perm]
    if layer.down_bias is not None:
        layer.down_bias[5] = layer.down_bias[2]
    choice, weights = without(5), torch.arange(1.0, EXPERTS + 1)
    found = homes(layer, choice.kept, weights, Clustering(0.999, seeds))
    # `own` begins where it ends; the others find it again
    assert torch.equal(found[5], found[2][perm]) and sorted(found[2].tolist()) == [
        2 * layer.width + j for j in range(layer.width)
    ]
    alone = RehomedNeurons.of(
        KeptExperts(EXPERTS, tuple(range(EXPERTS))), weights, torch.arange(EXPERTS * layer.width).view(EXPERTS, -1)
    )
    whole = KeptExperts(EXPERTS, tuple(range(EXPERTS)))
    with pruned(model, [choice, *[whole] * (len(layers) - 1)]):
        dropped = logits(model)
    edit = RehomeChange((RehomedNeurons.of(choice, weights, found), *[alone] * (len(layers) - 1)))
    with edit.installed(model, layers):
        assert relative(logits(model), dropped) < 1e-5
    for name, p in model.named_parameters():
        p.copy_(saved[name])


@torch.no_grad()
def test_means_are_what_a_loop_says(model):
    layers, found = find_layers(model), change(model, "dern:keep=0.5:threshold=0.1")
    layer, own = layers[0], found.layers[0]
    before = [view.clone() for view in (layer.up, layer.down.transpose(1, 2))]
    with found.installed(model, layers):
        after = [view.clone() for view in (layer.up, layer.down.transpose(1, 2))]
    places, met = own.homes(), 0
    for e in own.choice.kept:
        for j in range(layer.width):
            members = (places == e * layer.width + j).nonzero().tolist()
            met += len(members) > 1
            for old, new in zip(before, after, strict=True):
                rows = torch.stack([old[a, b] for a, b in members]).double()
                share = torch.tensor([own.weights[a] for a, _ in members], dtype=torch.float64)
                share /= share.sum()
                direction = (nn.functional.normalize(rows, dim=1) * share[:, None]).sum(0)
                wanted = direction / direction.norm() * (rows.norm(dim=1) * share).sum()
                torch.testing.assert_close(new[e, j].double(), wanted, rtol=1e-5, atol=1e-6)
                assert len(members) > 1 or torch.equal(new[e, j], rows[0].float())
    assert met


@torch.no_grad()
def test_neurons_move_to_who_has_the_most_similar_one(model):
    """By brute force: from the cosine on, and the others go."""
    layers, found = find_layers(model), change(model, "dern:keep=0.75:threshold=0.35")
    layer, own = layers[0], found.layers[0]
    units = nn.functional.normalize(torch.cat([layer.up, layer.down.transpose(1, 2)], 2).float(), dim=2)
    places, size, gone = own.homes(), layer.width, 0
    for e in own.choice.gone:
        for j in range(size):
            cosines = {(a, b): float(units[e, j] @ units[a, b]) for a in own.choice.kept for b in range(size)}
            (expert, _), best = max(cosines.items(), key=lambda item: item[1])
            assert int(places[e, j]) // size == (expert if best >= 0.35 else -1)
            gone += best < 0.35
    assert gone


def test_the_model_comes_back_and_so_does_the_plain_form(model):
    before, layers, found = logits(model), find_layers(model), change(model, "dern:keep=0.5:threshold=0")
    with found.installed(model, layers):
        assert relative(logits(model), before) > 1e-3
    assert torch.equal(logits(model), before)
    assert change_of(WeightChange.from_json(found.part().to_json())) == found and found.resident_share == 0.5
    shields = [torch.arange(EXPERTS) < 2 for _ in layers]
    held = change(model, "dern:keep=0.5", shields)
    assert all({0, 1} <= set(own.choice.kept) for own in held.layers)
    with change(model, "dern:keep=1").installed(model, layers):
        assert torch.equal(logits(model), before)


def test_nothing_moves_where_nothing_is_alike(model):
    """A cosine of 1: plain removal, to the bit."""
    layers, found = find_layers(model), change(model, "dern:keep=0.5:threshold=1")
    with pruned(model, found.staying):
        dropped = logits(model)
    with found.installed(model, layers):
        assert torch.equal(logits(model), dropped)


@pytest.mark.parametrize(("noise", "first"), [(0.0, range(6)), (0.02, range(0, 30, 5))])
def test_clusters_of_clear_groups_are_those_groups(noise, first):
    """Copies are found from any seeds: a cluster that finds nothing begins again elsewhere."""
    g = torch.Generator().manual_seed(0)
    centres = nn.functional.normalize(torch.randn(6, 40, generator=g), dim=1)
    points = nn.functional.normalize(centres.repeat_interleave(5, 0) + noise * torch.randn(30, 40, generator=g), dim=1)
    found = clusters(points, torch.ones(30), torch.tensor(first))
    assert len(found.unique()) == 6 and all(len(own.unique()) == 1 for own in found.view(6, 5))


def test_what_cannot_be_meant_is_refused(model):
    found = change(model, "dern:keep=0.5")
    row = found.settings()["layers"][0]
    for wrong, words in (
        ({"places": "!"}, "no base64"),
        ({"places": row["places"][:-8]}, "are not those of"),
        ({"weights": row["weights"][1:]}, "are not those of"),
        ({"kept": row["kept"][1:]}, "places that are not there"),
    ):
        with pytest.raises(CorruptError, match=words):
            RehomeChange.from_settings({"layers": [{**row, **wrong}]})
    with pytest.raises(UsageError, match="of a model with other experts"):
        replace(found, layers=found.layers[:1]).check_fits(find_layers(model))
    for name, words in (("dern:seeds=love", "has no seeds"), ("dern:threshold=2", "no cosine"), ("dern:by=odd", "no weights")):
        with pytest.raises(UsageError, match=words):
            method(name)
    with pytest.raises(UsageError, match="a token uses 2"):
        change(model, "dern:keep=0.1")
