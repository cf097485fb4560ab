"""Experts of alike outputs: clusters, the identity of the untruncated form, and thin matrices."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.compress.changes import change_of
from moe_prism.compress.merge.change import MergeChange
from moe_prism.compress.merge.kernel import k_means
from moe_prism.compress.merge.subspace import SubspaceChange
from moe_prism.compress.quantize.decoded import matrices
from moe_prism.errors import CorruptError, UsageError
from moe_prism.methods.find import method
from moe_prism.methods.merge.base import routed_layers
from moe_prism.model import find_layers
from moe_prism.point import WeightChange
from tests.compress.tiny import EXPERTS, IDS, build, logits, relative


@pytest.fixture(scope="module", params=["softmax", "router-bias"])
def model(request):
    return build(request.param)


def change(model, name, shields=()):
    layers, found = find_layers(model), method(name)
    work = Pass(model, layers, Settings(collectors=("counts", "pairs", "grams", "inputs"), batch=2))
    work.run(IDS)
    values = [own.values for own in work.statistics().layers]
    return found.change(routed_layers(model, layers, values), found.parameters.keep, shields)


def inertia(likeness, labels):
    """From points in a space that has these inner products."""
    values, vectors = torch.linalg.eigh(likeness)
    points = vectors * values.clamp(min=0).sqrt()
    return sum(float((points[labels == c] - points[labels == c].mean(0)).square().sum()) for c in set(labels.tolist()))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_k_means_finds_the_best_clusters_of_few(count):
    draw = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    likeness = draw @ draw.T
    labels, lost = k_means(likeness, count, 0)
    assert len(labels.unique()) == count and lost == pytest.approx(inertia(likeness, labels), abs=1e-9)
    every = (torch.tensor(own) for own in itertools.product(range(count), repeat=6) if len(set(own)) == count)
    assert lost == pytest.approx(min(inertia(likeness, own) for own in every), abs=1e-9)


def test_copies_are_one_cluster_even_where_too_many_are_asked_for():
    labels, lost = k_means(torch.ones(4, 4, dtype=torch.float64), 3, 0)
    assert len(labels.unique()) == 3 and lost == pytest.approx(0, abs=1e-9)


@torch.no_grad()
def test_untruncated_it_is_the_weighted_mean(model):
    """The paper's way, with a singular value decomposition in any space, against the edit."""
    layers = find_layers(model)
    found = change(model, "sub-moe:keep=0.5:align=false")
    assert isinstance(found, MergeChange)
    before = [[m.clone().double() for m in matrices(layer)] for layer in layers]
    with found.installed(model, layers):
        for layer, own, old in zip(layers, found.layers, before, strict=True):
            for members in own.members():
                share = torch.tensor([own.weights[e] for e in members], dtype=torch.float64)
                share /= share.sum()
                for new, matrix in zip(matrices(layer), old, strict=True):
                    u, s, v = torch.linalg.svd(torch.cat([matrix[e] for e in members], 1), full_matrices=False)  # side by side
                    parts = v.T.reshape(len(members), matrix.shape[2], -1)
                    wanted = u @ torch.diag(s) @ (share[:, None, None] * parts).sum(0).T
                    torch.testing.assert_close(new[members[0]].double(), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("white", ["true", "false"])
def test_thin_matrices_are_the_joint_decomposition_cut_off(model, white):
    layers = find_layers(model)
    found = change(model, f"sub-moe:keep=0.5:thin=0.5:white={white}")
    assert isinstance(found, SubspaceChange) and (white == "true") == bool(found.scales)
    layer, own, rank = layers[0], found.merged.layers[0], found.rank
    scale = torch.tensor(found.scales[0] if found.scales else [1.0] * layer.hidden, dtype=torch.float64)
    before, orders = [m.clone().double() for m in matrices(layer)], own.order()
    with found.installed(model, layers):
        after = [m.clone().double() for m in matrices(layer)]
    for members in own.members():
        share = torch.tensor([own.weights[e] for e in members], dtype=torch.float64)
        share /= share.sum()
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if i == len(before) - 1:
                u = torch.linalg.svd(torch.cat([old[e] for e in members], 1)).U[:, :rank]
                mean = sum(s * old[e][:, orders[e]] for s, e in zip(share, members, strict=True))
                wanted = u @ u.T @ mean
            else:
                v = torch.linalg.svd(torch.cat([old[e] * scale for e in members])).Vh[:rank]
                mean = sum(s * old[e][orders[e]] for s, e in zip(share, members, strict=True))
                wanted = (mean * scale) @ v.T @ v / scale
            torch.testing.assert_close(new[members[0]], wanted, rtol=1e-4, atol=1e-5)
            assert int(torch.linalg.matrix_rank(new[members[0]].float(), rtol=1e-4)) <= rank


def test_the_model_comes_back_and_so_does_the_plain_form(model):
    before, layers = logits(model), find_layers(model)
    for name in (
        "sub-moe:keep=0.5",
        "sub-moe:keep=0.5:thin=0.5",
        "sub-moe:keep=0.5:clusters=scores",
        "sub-moe:keep=0.5:clusters=random:joint=1",
    ):
        found = change(model, name)
        with found.installed(model, layers):
            assert relative(logits(model), before) > 1e-3
        assert torch.equal(logits(model), before)
        assert change_of(WeightChange.from_json(found.part().to_json())) == found
        merged = getattr(found, "merged", found)
        assert merged.resident_share == 0.5 and sum(len(set(own.groups)) for own in merged.layers) == EXPERTS * len(layers) // 2
    with change(model, "sub-moe:keep=1").installed(model, layers):
        assert torch.equal(logits(model), before)
    held = change(model, "sub-moe:keep=0.5", [torch.arange(EXPERTS) < 2 for _ in layers])
    assert all(own.groups.count(e) == 1 for own in held.layers for e in (0, 1))


@torch.no_grad()
def test_what_is_protected_stays_whole(model):
    layers = find_layers(model)
    found = change(model, "sub-moe:keep=0.5:thin=0.5", [torch.arange(EXPERTS) < 2 for _ in layers])
    before = [layer.up.clone() for layer in layers]
    with found.installed(model, layers):
        for layer, old in zip(layers, before, strict=True):
            assert torch.equal(layer.up[:2], old[:2]) and not torch.equal(layer.up[2:], old[2:])
    prices = found.bytes_per_weight(layers, 0, 4.0)
    own = found.merged.layers[0]
    assert prices[:2].tolist() == [4.0, 4.0] and float(prices[2]) < 4.0
    held = sum(float(prices[g]) for g in set(own.groups)) / 4.0 / EXPERTS
    assert held == pytest.approx(found.resident_share, rel=0.2) and len(found.whole) == len(layers)


def test_what_cannot_be_meant_is_refused(model):
    for name, words in (
        ("sub-moe:clusters=love", "has no clusters"),
        ("sub-moe:thin=1", "no share of bytes"),
        ("sub-moe:joint=0", "clusters no layers together"),
    ):
        with pytest.raises(UsageError, match=words):
            method(name)
    with pytest.raises(UsageError, match="more experts are protected"):
        change(model, "sub-moe:keep=0.25", [torch.arange(EXPERTS) < 6 for _ in find_layers(model)])
    thin = change(model, "sub-moe:keep=0.5:thin=0.5")
    with pytest.raises(CorruptError, match="the scales are not those"):
        SubspaceChange.from_settings({**thin.settings(), "scales": [[1.0]]})
    with pytest.raises(UsageError, match="have no 500 directions"):
        SubspaceChange.from_settings({**thin.settings(), "rank": 500}).check_fits(find_layers(model))
