"""Neurons with widths of their own: exact in their order, each at its width, and cut into the bands that lose least."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.compress.changes import change_of
from moe_prism.compress.codec.rtn import Rtn
from moe_prism.compress.quantize.bands import BandChange
from moe_prism.compress.quantize.decoded import matrices
from moe_prism.errors import CorruptError, UsageError
from moe_prism.methods.quantize.camera_q import CameraQ, banded, energy, rounding_losses
from moe_prism.model import find_layers
from moe_prism.point import WeightChange
from tests.parity.families import build


def digits(layers, seed=0, widths="12348"):
    g = torch.Generator().manual_seed(seed)
    return tuple(
        tuple(
            "".join(widths[i] for i in torch.randint(0, len(widths), (layer.width,), generator=g))
            for _ in range(layer.num_experts)
        )
        for layer in layers
    )


@pytest.fixture(scope="module", params=["olmoe", "nemotron_h"])
def model(request):
    return build(request.param)


def copies(layers):
    return [w.clone() for layer in layers for w in matrices(layer)]


@torch.no_grad()
def test_a_band_is_what_its_neurons_are_at_their_width(model):
    layers = find_layers(model)
    neurons, before = digits(layers), copies(layers)
    change, codec = BandChange(Rtn(), neurons, 32), Rtn()
    with change.installed(model, layers):
        number = 0
        for layer, row in zip(layers, neurons, strict=True):
            own = matrices(layer)
            source = before[number : number + len(own)]
            number += len(own)
            for e, expert in enumerate(row):
                for bits in set(expert):
                    mine = [j for j, digit in enumerate(expert) if digit == bits]
                    for now, was in zip(own[:-1], source[:-1], strict=True):
                        wanted = codec.decode(codec.encode(was[e][mine], int(bits), 32), int(bits))
                        assert torch.equal(now[e][mine], wanted.to(now))
                    wanted = codec.decode(codec.encode(source[-1][e][:, mine], int(bits), 32), int(bits))
                    assert torch.equal(own[-1][e][:, mine], wanted.to(own[-1]))
    assert all(torch.equal(a, b) for a, b in zip(copies(layers), before, strict=True))
    sizes = change.bytes_per_weight(layers, 0, 2.0)
    expert = neurons[0][0]
    rows, d = len(before) // len(layers) - 1, layers[0].hidden
    whole = sum(
        rows * codec.bytes((expert.count(b), d), int(b), 32) + codec.bytes((d, expert.count(b)), int(b), 32) for b in set(expert)
    )
    assert float(sizes[0]) == pytest.approx(whole / (layers[0].parameters_per_expert()), rel=1e-6)


@torch.no_grad()
def test_the_order_of_neurons_changes_no_output():
    model = build("olmoe")
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    layers = find_layers(model)
    for layer, row in zip(layers, digits(layers), strict=True):
        layer.permute(torch.stack([torch.tensor([-int(digit) for digit in expert]).argsort(stable=True) for expert in row]))
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)


def test_the_settings_survive_json_and_a_damaged_file_does_not(model):
    layers = find_layers(model)
    change = BandChange(Rtn(), digits(layers), 32)
    part = change.part()
    assert change_of(part) == change
    for wrong in ({"neurons": [["4x"]]}, {"neurons": [["²"]]}, {"neurons": []}, {"neurons": [["9"]]}, {"group": 33}, {"more": 1}):
        with pytest.raises((CorruptError, UsageError)):
            change_of(WeightChange(change="bands", settings={**part.settings, **wrong}))
    with pytest.raises(UsageError, match="not those of this model"):
        BandChange(Rtn(), (*change.neurons, change.neurons[0]), 32).installed(model, layers)


@torch.no_grad()
def test_a_neurons_energy_is_what_the_output_loses_without_it():
    model = build("olmoe")
    layers = find_layers(model)
    work = Pass(model, layers, Settings(collectors=("counts", "tokens")))
    work.run(torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0)))
    layer, own = layers[0], work.statistics().layers[0]
    found, e, j = energy(layer, own), 2, 5
    x, weight = own.inputs(e)
    whole = layer.project(e, layer.activations(e, x)) * weight[:, None]
    kept = torch.tensor([n for n in range(layer.width) if n != j])
    part = (layer.activations(e, x)[:, kept] @ layer.down[e][:, kept].T) * weight[:, None]
    lost = (whole - part).double().square().sum(1).mean() * own.values["counts"]["count"][e]
    torch.testing.assert_close(found[e, j], lost, rtol=1e-4, atol=1e-12)
    losses = rounding_losses(layer, 32, (1, 2, 3))
    assert losses[0] > losses[1] > losses[2] > 0


@given(seed=st.integers(0, 999), mean=st.sampled_from([1.5, 2.0, 2.25, 3.0]))
@settings(max_examples=20, deadline=None)
def test_no_cut_of_the_ranking_loses_less(seed, mean):
    """Four neurons, a band each: against every choice of widths that takes no more bits."""
    energies = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    losses = [0.4, 0.1, 0.02]
    found = banded(energies, losses, (1, 2, 3), mean)
    assert int(found.sum()) <= round(mean * 4)
    cost = sum(float(e) * losses[b - 1] for e, b in zip(energies.flatten(), found.flatten().tolist(), strict=True))
    every = [w for w in itertools.product((1, 2, 3), repeat=4) if sum(w) <= round(mean * 4)]
    best = min(sum(float(e) * losses[b - 1] for e, b in zip(energies.flatten(), w, strict=True)) for w in every)
    assert cost == pytest.approx(best)


def test_what_it_does_not_know_is_refused():
    for text in ("bits=4", "widths=2-x", "widths=2-11"):
        with pytest.raises(UsageError):
            CameraQ("camera-q", CameraQ.read_argument("camera-q", text)).points(None)
