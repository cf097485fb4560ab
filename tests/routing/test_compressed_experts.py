"""Compressed Experts: the layer against its formula, ones against plain counts, and what the fit is worth."""

from __future__ import annotations

import pytest
import torch

from moe_prism.artefact.open import open_model
from moe_prism.elastic.bind import Step, bind
from moe_prism.errors import UsageError
from moe_prism.jobs.frontier import subject_of
from moe_prism.methods.skip.base import skip_method
from moe_prism.methods.skip.profile import own_rule
from moe_prism.options.frontier import FrontierOptions
from moe_prism.point import FULL, OperatingPoint, RoutingStage

NAMES = ("gate", "up", "neurons")


@pytest.fixture(scope="module")
def opened(elastic_tiny):
    return open_model(elastic_tiny)


@pytest.fixture(scope="module")
def subject(opened, text_file):
    options = FrontierOptions(text=str(text_file), tokens=512, length=32, calibration_tokens=2048, per_method=3)
    return subject_of(opened, options)


def vectors_of(opened, seed, spread=0.3):
    """(v1, v3 [E, d], v2 [E, f]) of every layer, around one."""
    g = torch.Generator().manual_seed(seed)
    layers = [layer.parts.layer for layer in opened.elastic.layers]
    sizes = [(own.num_experts, width) for own in layers for width in (own.hidden, own.hidden, own.width)]
    found = [1 + spread * torch.randn(size, generator=g) for size in sizes]
    return [found[i : i + 3] for i in range(0, len(found), 3)]


def point_of(opened, vectors, n, keep_mass=False):
    parameters = {
        name: tuple(tuple(float(v) for v in own[j].flatten()) for own in vectors) for j, name in enumerate(NAMES)
    } if vectors else {}  # fmt: skip
    if vectors:
        parameters["experts"] = tuple((float(own[0].shape[0]),) for own in vectors)
    counts = (n,) * len(opened.elastic.layers)
    stage = RoutingStage(layers=counts, stage="compressed-experts", parameters=parameters, keep_mass=keep_mass)
    return OperatingPoint(routing=(stage,))


def by_formula(layer, vectors, x, index, weight, n):
    """Token by token, as the paper has it."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        order = weight[t].argsort(descending=True, stable=True).tolist()
        main, rest = order[:n], order[n:]
        share = weight[t][rest] / weight[t][rest].sum()
        v1, v3, v2 = (sum(s * table[index[t, c]] for s, c in zip(share, rest, strict=True)) for table in vectors)
        for c in main:
            e = index[t, c]
            gate, up = layer.gate[e] @ (x[t] * v1), layer.up[e] @ (x[t] * v3)
            out[t] += weight[t, c] * (layer.down[e] @ (torch.nn.functional.silu(gate) * up * v2))
    return out


@torch.no_grad()
def test_a_layer_is_its_formula(opened):
    elastic, vectors = opened.elastic, vectors_of(opened, 0)
    layer, own = elastic.layers[0], elastic.layers[0].parts.layer
    g = torch.Generator().manual_seed(1)
    x = torch.randn(24, own.hidden, generator=g)
    index = torch.stack([torch.randperm(own.num_experts, generator=g)[: elastic.k] for _ in range(len(x))])
    weight = torch.rand(index.shape, generator=g)
    for n in range(1, elastic.k):
        with elastic.at(Step(bind(elastic, [point_of(opened, vectors, n)]))):
            found = layer(x, index, weight)
        wanted = by_formula(own, vectors[0], x, index, weight, n)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_ones_are_plain_counts_and_sub_experts_go_with_it(opened):
    elastic, ids = opened.elastic, torch.arange(5, 45).view(1, -1)

    def logits(point):
        with elastic.at(Step(bind(elastic, [point]))):
            return opened.model(input_ids=ids).logits

    ones = vectors_of(opened, 0, spread=0.0)
    plain = OperatingPoint(routing=(RoutingStage(layers=(1,) * len(elastic.layers), keep_mass=False),))
    wanted = logits(plain)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * float(wanted.abs().max())}
    torch.testing.assert_close(logits(point_of(opened, ones, 1)), wanted, **tolerance)
    torch.testing.assert_close(logits(point_of(opened, None, 1)), wanted, **tolerance)
    half = OperatingPoint.from_json({**plain.to_json(), "slots": {"rule": "threshold", "budget": 0.5, "compensate": False}})
    both = OperatingPoint.from_json({**point_of(opened, ones, 1).to_json(), "slots": half.to_json()["slots"]})
    torch.testing.assert_close(logits(both), logits(half), **tolerance)
    assert torch.equal(logits(point_of(opened, ones, elastic.k)), logits(FULL))


@torch.no_grad()
def test_tokens_of_one_batch_have_their_own_vectors(opened):
    elastic, ids = opened.elastic, torch.arange(5, 37).view(1, -1)
    points = [
        point_of(opened, vectors_of(opened, 0), 1),
        FULL,
        point_of(opened, vectors_of(opened, 1), 1),
        point_of(opened, None, 1),
    ]
    batch = ids.repeat(len(points), 1)
    bound = bind(elastic, points)
    with elastic.at(Step(bound, torch.arange(len(points)).repeat_interleave(ids.shape[1]))):
        together = opened.model(input_ids=batch).logits
    for row, point in enumerate(points):
        with elastic.at(Step(bind(elastic, [point]))):
            alone = opened.model(input_ids=ids).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max()))


def test_the_fit_lowers_the_error_of_layers_on_tokens_it_has_not_seen(subject):
    fitted = skip_method("compressed-experts:counts=uniform:steps=60").fit(subject, 1)
    before, after = (sum(pair[i] for pair in fitted.facts["layer_errors"]) for i in (0, 1))
    assert 0 < after < before and fitted.mean == 1
    whole = skip_method("compressed-experts:counts=uniform:steps=1").fit(subject, float(subject.k))
    assert all(pair == [0.0, 0.0] for pair in whole.facts["layer_errors"])
    assert own_rule(subject) in (True, False)


def test_what_does_not_fit_is_refused(opened, subject):
    elastic, vectors = opened.elastic, vectors_of(opened, 0)
    with pytest.raises(UsageError, match="fits nothing"):
        skip_method("compressed-experts:steps=0").fit(subject, 1)
    lame = [[row[:, :-1] for row in own] for own in vectors]
    with pytest.raises(UsageError, match="of another model"), elastic.at(Step(bind(elastic, [point_of(opened, lame, 1)]))):
        opened.model(input_ids=torch.arange(5, 9).view(1, -1))
    stages = point_of(opened, vectors, 1).to_json()["routing"]
    cut = {"stage": "gate-threshold", "layers": [elastic.k] * len(vectors), "parameters": {"cutoff": [[0.1]] * len(vectors)}}
    both = OperatingPoint.from_json({**FULL.to_json(), "routing": [*stages, {**cut, "keep_mass": False}]})
    with pytest.raises(UsageError, match="chain one of the two stages"):
        bind(elastic, [both])
