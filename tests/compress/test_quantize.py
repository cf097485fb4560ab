"""Experts in fewer bits as a change of weights: widths per layer and expert, exact on the way out, encoded once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moe_prism.compress.changes import change_of
from moe_prism.compress.codec.nested import Nested
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize import QuantizeChange
from moe_prism.compress.quantize.decoded import matrices
from moe_prism.errors import CorruptError, UsageError
from moe_prism.model import find_layers
from moe_prism.point import WeightChange

from .tiny import build


@pytest.fixture(scope="module")
def model():
    return build("softmax")


def copies(layers):
    return [w.clone() for layer in layers for w in matrices(layer)]


def test_every_expert_is_what_its_own_width_gives_back(model):
    layers = find_layers(model)
    experts = layers[0].num_experts
    widths = tuple(tuple((0, 2, 4, 16)[(e + n) % 4] for e in range(experts)) for n in range(len(layers)))
    change, before = QuantizeChange(Rtn(), widths, 32), copies(layers)
    with change.installed(model, layers):
        for layer, row in zip(layers, widths, strict=True):
            number = layers.index(layer) * 3
            for at, matrix in enumerate(matrices(layer)):
                source = before[number + at]
                for e, bits in enumerate(row):
                    wanted = {0: torch.zeros_like(source[e]), 16: source[e]}.get(bits)
                    if wanted is None:
                        wanted = Rtn().decode(Rtn().encode(source[e], bits, 32), bits).to(source)
                    assert torch.equal(matrix[e], wanted)
    assert all(torch.equal(a, b) for a, b in zip(copies(layers), before, strict=True))
    sizes = change.bytes_per_weight(layers, 0, 2.0)
    assert sizes[0] == 0 and sizes[3] == 2.0 and 0.25 < sizes[1] < sizes[2] < 1


def test_it_is_encoded_once_and_again_when_the_weights_have_changed(model):
    layers, change = find_layers(model), QuantizeChange(Nested(), 3.0, 32)
    with mock.patch.object(Nested, "encode", autospec=True, side_effect=Nested.encode) as encode:
        for _ in range(3):
            with change.installed(model, layers):
                pass
        once = encode.call_count
        assert once == len(copies(layers))
        with torch.no_grad():
            layers[0].up.mul_(2.0)
        with change.installed(model, layers):
            pass
        assert encode.call_count == 2 * once
        with torch.no_grad():
            layers[0].up.div_(2.0)


def test_the_weights_come_back_where_the_block_fails(model):
    layers = find_layers(model)
    before = copies(layers)
    with pytest.raises(RuntimeError), QuantizeChange(Rtn(), 2.0, 32).installed(model, layers):
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(copies(layers), before, strict=True))


GOOD = {"codec": "rtn", "options": {"symmetric": False}, "bits": [[4.0], [3.0, 4.0]], "group": 64}


def test_the_settings_survive_json():
    change = change_of(WeightChange(change="quantize", settings=GOOD))
    assert change == QuantizeChange(Rtn(symmetric=False), ((4.0,), (3.0, 4.0)), 64) and change.settings() == GOOD


@pytest.mark.parametrize(
    "wrong",
    [
        {"codec": "nothing"},
        {"codec": 3},
        {"bits": 11},
        {"bits": []},
        {"bits": [["4"]]},
        {"bits": None},
        {"group": 33},
        {"group": 32.0},
        {"options": {"symmetric": 1}},
        {"options": {"colour": True}},
        {"more": 1},
    ],
    ids=str,
)
def test_what_a_file_must_not_say_is_refused(wrong):
    with pytest.raises((CorruptError, UsageError)):
        change_of(WeightChange(change="quantize", settings={**GOOD, **wrong}))


def test_bits_of_another_model_are_refused(model):
    layers = find_layers(model)
    for widths in (((4.0,),) * (len(layers) + 1), ((4.0,) * (layers[0].num_experts + 1),) * len(layers)):
        with pytest.raises(UsageError, match="the model has"):
            QuantizeChange(Rtn(), widths, 32).installed(model, layers)
