"""Several changes of weights as one: in memory, undone, priced, in files, and what cannot follow what."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moe_prism.compress.chain import ChainChange
from moe_prism.compress.changes import change_of
from moe_prism.compress.codec.low_rank_sparse import LowRankSparse
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.slice.change import SliceChange
from moe_prism.errors import UsageError
from moe_prism.methods.find import method
from moe_prism.model import find_layers
from moe_prism.point import WeightChange
from tests.compress.test_dern import change
from tests.compress.tiny import build, logits, relative


@pytest.fixture(scope="module")
def model():
    return build("softmax")


def halves(layers):
    masks = [torch.rand(x.num_experts, x.width, generator=torch.Generator().manual_seed(1)) < 0.5 for x in layers]
    return SliceChange.of(masks)


def test_one_after_the_other_is_the_chain(model):
    layers, before = find_layers(model), logits(model)
    first, then = halves(layers), QuantizeChange(Rtn(), 4.0, 32)
    chain = ChainChange((first, then))
    with first.installed(model, layers), then.installed(model, layers):
        wanted = logits(model)
    with chain.installed(model, layers):
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), before)
    assert change_of(WeightChange.from_json(chain.part().to_json())) == chain
    assert chain.resident_share == pytest.approx(first.resident_share / 4)
    assert torch.equal(chain.neurons_there(layers, 0), first.neurons_there(layers, 0))
    assert torch.equal(chain.bytes_per_weight(layers, 0, 4.0), then.bytes_per_weight(layers, 0, 4.0))


def test_what_was_encoded_inside_is_not_encoded_again(model):
    layers = find_layers(model)
    chain = ChainChange((halves(layers), QuantizeChange(LowRankSparse(), 4.0, 32)))
    with mock.patch.object(LowRankSparse, "encode", autospec=True, side_effect=LowRankSparse.encode) as encode:
        found = []
        for _ in range(3):
            with chain.installed(model, layers):
                found.append(logits(model))
        calls = encode.call_count
        assert calls == 3 * len(layers) and torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
        with torch.no_grad():
            layers[0].up[0, 0, 0] += 1  # other weights: all of it again
        with chain.installed(model, layers):
            logits(model)
        assert encode.call_count > calls
        with torch.no_grad():
            layers[0].up[0, 0, 0] -= 1


@torch.no_grad()
def test_merged_experts_as_thin_matrices_and_rows(model):
    """MC-SMoE: the mean, then what the codec gives of it, the same for all members; protected experts stay."""
    layers = find_layers(model)
    found, merged = change(model, "mc-smoe:keep=0.5:bits=4"), change(model, "m-smoe:keep=0.5")
    assert isinstance(found, ChainChange) and found.parts[0] == merged
    codec = LowRankSparse()
    with merged.installed(model, layers):
        wanted = [codec.decode(codec.encode(layer.up, 4, 32), 4) for layer in layers]
    with found.installed(model, layers):
        for layer, own in zip(layers, wanted, strict=True):
            torch.testing.assert_close(layer.up, own, rtol=1e-5, atol=1e-6)
    assert found.resident_share == 0.5 / 4
    shields = [torch.arange(layer.num_experts) < 1 for layer in layers]
    before = [layer.up.clone() for layer in layers]
    with change(model, "mc-smoe:keep=0.5", shields).installed(model, layers):
        assert all(torch.equal(layer.up[0], old[0]) for layer, old in zip(layers, before, strict=True))


@torch.no_grad()
def test_a_chain_of_edits_is_one_edit(model):
    """Layer by layer on the weights alone, as it is written, and in memory: the same weights."""
    layers = find_layers(model)
    chain = ChainChange((change(model, "dern:keep=0.5:threshold=0"), QuantizeChange(Rtn(), 8.0, 32)))
    assert chain.staying is not None and all(chain.changes(i) for i in range(len(layers)))
    saved = [[p.detach().clone() for p in layer.module.parameters()] for layer in layers]
    with chain.installed(model, layers):
        inside, kept = [layer.up.clone() for layer in layers], [list(own.kept) for own in chain.staying]
    for number, layer in enumerate(layers):
        chain.edit(number, layer)
        assert relative(layer.up[kept[number]], inside[number][kept[number]]) < 1e-6
    with torch.no_grad():
        for layer, values in zip(layers, saved, strict=True):
            for p, old in zip(layer.module.parameters(), values, strict=True):
                p.copy_(old)


def test_what_cannot_follow_what_is_refused(model):
    layers = find_layers(model)
    few, thin, merged = QuantizeChange(Rtn(), 4.0, 32), QuantizeChange(Rtn(), 8.0, 32), change(model, "m-smoe:keep=0.5")
    for parts, words in (
        ((few, thin), "two edits of a chain say how experts are stored"),
        ((few, merged), "would change experts that are stored in fewer bits"),
        ((halves(layers), merged), "neurons that are not there cannot be merged"),
        ((merged, merged), "two edits of a chain merge experts"),
    ):
        with pytest.raises(UsageError, match=words):
            ChainChange(parts)
    for name, words in (
        ("threshold+rtn:4", "in an order that no model runs"),
        ("product+threshold", "in an order that no model runs"),
        ("rtn:4+love", "unknown method 'love'"),
    ):
        with pytest.raises(UsageError, match=words):
            method(name)
