"""Clusters under one threshold, who stays of them, and single weights that go."""

from __future__ import annotations

import pytest
import torch

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.compress.chain import ChainChange
from moe_prism.compress.changes import change_of
from moe_prism.compress.merge.linkage import complete_linkage, one_threshold
from moe_prism.compress.quantize.decoded import matrices
from moe_prism.compress.sparse import SparseChange
from moe_prism.errors import CorruptError, UsageError
from moe_prism.methods.find import method
from moe_prism.methods.merge.base import routed_layers
from moe_prism.methods.merge.stun import _outliers, _owl
from moe_prism.model import find_layers
from moe_prism.point import WeightChange
from tests.compress.tiny import EXPERTS, IDS, build, logits, relative


@pytest.fixture(scope="module", params=["softmax", "router-bias"])
def model(request):
    return build(request.param)


def gathered(model):
    layers = find_layers(model)
    work = Pass(model, layers, Settings(collectors=("pairs", "inputs", "neurons"), batch=2))
    work.run(IDS)
    return routed_layers(model, layers, [own.values for own in work.statistics().layers])


def change(model, name, shields=()):
    found = method(name)
    return found.change(gathered(model), found.parameters.keep, shields)


def by_joining(distances, threshold):
    """As the paper's code does: the closest pair first, joined where every cross pair is below the threshold."""
    clusters = [{e} for e in range(len(distances))]
    pairs = sorted((float(distances[a, b]), a, b) for a in range(len(distances)) for b in range(a))
    joined = True
    while joined:
        joined = False
        for _, a, b in pairs:
            one, two = (next(c for c in clusters if e in c) for e in (a, b))
            if one is not two and max(float(distances[i, j]) for i in one for j in two) < threshold:
                clusters.remove(two)
                one |= two
                joined = True
                break
    return clusters


def test_clusters_are_those_of_the_threshold():
    draw = torch.rand(9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    distances = draw + draw.T - 1  # some are below zero, as co-activation is
    for count in (2, 4, 7, 9):
        labels = complete_linkage(distances, count)
        assert len(labels.unique()) == count
        widest = max(
            (
                float(distances[i, j])
                for c in labels.unique()
                for i in (labels == c).nonzero()[:, 0]
                for j in (labels == c).nonzero()[:, 0]
                if i != j
            ),
            default=-9.0,
        )
        clusters = by_joining(distances, widest + 1e-9)
        assert len(clusters) <= count  # no more clusters under the same threshold than the tree cuts
    assert complete_linkage(torch.zeros(6, 6), 4).unique().tolist() == [0, 1, 2, 3]  # all joins at one height


def test_one_threshold_for_all_layers_leaves_as_many_as_are_wanted():
    g = torch.Generator().manual_seed(0)
    near, far = (scale * torch.rand(8, 8, generator=g, dtype=torch.float64) for scale in (0.1, 1.0))
    counts = one_threshold([near + near.T, far + far.T], 10, [2, 2])
    assert sum(counts) == 10 and counts[0] < counts[1] and min(counts) >= 2
    assert one_threshold([near + near.T, far + far.T], 4, [2, 2]) == [2, 2]


@torch.no_grad()
def test_of_every_row_the_largest_by_weight_and_input_stay(model):
    layers, every = find_layers(model), gathered(model)
    found = change(model, "stun:keep=0.5:drop=0:owl=false")
    assert isinstance(found, SparseChange) and {own.density for own in found.layers} == {0.5}
    before = [[m.clone() for m in matrices(layer)] for layer in layers]
    sums = torch.zeros(EXPERTS, layers[0].hidden, dtype=torch.float64)
    rows = []
    layers[0].install(lambda x, i, w: rows.append((x.clone(), i.clone())) or layers[0].stock(x, i, w))
    logits(model)
    layers[0].uninstall()
    for x, index in rows:
        for token, own in enumerate(index.tolist()):
            for e in own:
                sums[e] += x[token].double().square()
    torch.testing.assert_close(every[0].of("inputs")["sq"], sums, rtol=1e-4, atol=1e-4)
    with found.installed(model, layers):
        for number, (layer, old) in enumerate(zip(layers, before, strict=True)):
            inputs, middle = found.layers[number].norms()
            for place, (matrix, was) in enumerate(zip(matrices(layer), old, strict=True)):
                norms = middle if place == len(old) - 1 else inputs
                for e in range(EXPERTS):
                    for row, source in zip(matrix[e], was[e], strict=True):
                        score = (source.abs() * norms[e]).tolist()
                        stay = sorted(range(len(score)), key=lambda j: -score[j])[: len(score) // 2]
                        assert set(row.nonzero()[:, 0].tolist()) == set(stay) and torch.equal(row[stay], source[stay])


def test_the_nearest_to_the_mean_stays_and_the_router_loses_the_rows_of_the_others(model):
    before, layers = logits(model), find_layers(model)
    found = change(model, "stun:keep=0.5:drop=0.25")
    assert isinstance(found, ChainChange) and [len(own.kept) for own in found.staying] == [6] * len(layers)
    with found.installed(model, layers):
        assert relative(logits(model), before) > 1e-3
    assert torch.equal(logits(model), before)
    assert change_of(WeightChange.from_json(found.part().to_json())) == found
    zeros = sum(own.density for own in found.parts[1].layers) / len(layers)
    assert zeros == pytest.approx(0.5 / 0.75, abs=0.02)
    for by in ("scores", "random"):
        assert change(model, f"stun:keep=0.5:drop=0.25:by={by}") != found
    together = change(model, "stun:keep=0.5:drop=0.25:scope=model")
    assert sum(len(own.kept) for own in together.staying) == 6 * len(layers)
    held = change(model, "stun:keep=0.5:drop=0.25", [torch.arange(EXPERTS) < 2 for _ in layers])
    assert all({0, 1} <= set(own.kept) for own in held.staying)


def test_layers_with_more_outliers_keep_more(model):
    layer = gathered(model)[0]
    flat = torch.ones(EXPERTS, layer.layer.hidden), torch.ones(EXPERTS, layer.layer.width)
    steep = flat[0].clone()
    steep[:, 0] = 1e3
    assert _outliers(layer, steep, flat[1]) > _outliers(layer, *flat)
    found = _owl([0.0, 0.1, 0.3], 0.5)
    assert sum(found) / 3 == pytest.approx(0.5) and found == sorted(found) and max(found) - min(found) == pytest.approx(0.16)
    assert _owl([0.1, 0.1], 0.5) == [0.5, 0.5]


def test_what_cannot_be_meant_is_refused(model):
    for name, words in (
        ("stun:by=love", "has no by=love"),
        ("stun:scope=town", "has no scope=town"),
        ("stun:keep=0.9:drop=0.25", "drops more than it may"),
    ):
        with pytest.raises(UsageError, match=words):
            method(name)
    with pytest.raises(UsageError, match="fewer experts than a token uses"):
        change(model, "stun:keep=0.1:drop=0.9")
    row = change(model, "stun:keep=0.5:drop=0").settings()["layers"][0]
    for wrong, words in (({"inputs": "!"}, "no base64"), ({"middle": row["middle"][:8]}, "not those of")):
        with pytest.raises(CorruptError, match=words):
            SparseChange.from_settings({"layers": [{**row, **wrong}]})
    with pytest.raises(UsageError, match="with other experts"):
        SparseChange.from_settings({"layers": [row]}).check_fits(find_layers(model))
