"""With its neutral settings an architecture is the plain mixture, to the bit."""

import pytest
import torch

from moe_prism.architectures.base import routers
from tests.architectures.small import example, logits_of, model_of, recipe, trained

SAME_MODEL = {
    "dynamic-moe": ({"top_p": 1.0}, {"normalise": False}),
    "adamoe": ({"nulls": 0}, {}),
    "moe-plus-plus": ({"zeros": 0, "copies": 0, "constants": 0, "residual": False}, {}),
    "rexmoe": ({"group": 1}, {}),
    "smoe-dropout": ({}, {}),
    "elastic": ({}, {}),
    "sigma-moe": ({}, {"normalise": False}),
    "sinkhorn": ({}, {}),
    "graph-of-tokens": ({"share": 0.0}, {}),
}
"""architecture -> (its neutral settings, those of the plain one)."""
SAME_TRAINING = {
    "elastic": ({"weight": 0.0}, {}, {}),
    "sigma-moe": ({"first": 2}, {"normalise": False}, {}),
    "sinkhorn": ({"share": 0.0, "noise": 0.0}, {}, {}),
    "rexmoe": ({"group": 1, "begin": 0.0, "end": 0.0}, {}, {}),
    "dynamic-moe": ({"top_p": 1.0, "entropy": 0.0}, {"normalise": False}, {}),
    "graph-of-tokens": ({"share": 0.0}, {}, {}),
}


@pytest.mark.parametrize("name", SAME_MODEL)
def test_a_neutral_model_is_the_plain_one(name):
    own, plain = SAME_MODEL[name]
    architecture = example(name, **own)
    first = model_of(architecture)
    second = model_of(type(example("top-k"))(architecture.shape, plain), seed=1)
    left = second.load_state_dict(first.state_dict(), strict=False)
    assert not left.missing_keys
    assert all(t.numel() == 0 for n, t in first.state_dict().items() if n in left.unexpected_keys)
    assert torch.equal(logits_of(first), logits_of(second))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("elastic", "dynamic-moe") else pytest.mark.slow) for n in SAME_TRAINING]
)
def test_a_neutral_training_is_the_plain_one(name, tmp_path):
    own, plain, more = SAME_TRAINING[name]
    shape = recipe("top-k")["model"]
    first = trained(tmp_path / "own", name, settings=own, model=shape, **more)
    second = trained(tmp_path / "plain", "top-k", settings=plain, model=shape, **more)
    assert first.curve.train == second.curve.train
    assert first.curve.held == second.curve.held


def test_one_pass_of_a_chain_is_the_plain_block_with_its_input():
    chain = model_of(example("chain-of-experts", passes=1))
    plain = model_of(example("top-k"))
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    for one, other in zip(chain.model.layers, plain.model.layers, strict=True):
        other.mlp.experts.load_state_dict(one.mlp.experts.state_dict())
        other.mlp.gate.load_state_dict(one.mlp.passes[0].gate.state_dict())
        assert torch.allclose(one.mlp(x), other.mlp(x) + x, atol=1e-6)


def test_a_recurrent_router_with_its_recurrence_off_knows_its_own_layer_alone():
    model = model_of(example("rmoe"))
    cell, size = model.model.recurrence, model.config.router_state
    with torch.no_grad():
        cell.weight_hh.zero_()
        cell.bias_hh.zero_()
        cell.bias_ih[size : 2 * size] = -1e4  # the update gate: nothing of the old state stays
    gate = model.model.layers[1].mlp.gate
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    gate.carried.value = torch.randn(6, size)
    logits, _, _ = gate(x)
    entered = x @ gate.enter.weight.T
    state = (entered @ cell.weight_ih[2 * size :].T + cell.bias_ih[2 * size :]).tanh()
    assert torch.allclose(logits, state @ gate.weight.T, atol=1e-6)


def test_a_recurrent_router_has_the_parameters_of_its_formula():
    shape, h = example("rmoe").shape, 6
    own, plain = (sum(p.numel() for p in model_of(example(name)).parameters()) for name in ("rmoe", "top-k"))
    d, experts, layers = shape.hidden, shape.experts, shape.layers
    assert own - plain == layers * (d * h + h * experts) + 6 * h * h + 6 * h - layers * d * experts


def test_shared_and_routed_experts_add_up_to_the_block():
    model = model_of(example("deepseek-moe"))
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    block = model.model.layers[0].mlp
    _, weights, ids = block.gate(x)
    routed = block.experts(x[0], ids, weights)
    assert torch.allclose(block(x)[0], routed + block.shared_experts(x)[0], atol=1e-6)
    assert len(routers(model)) == 2


@pytest.mark.parametrize("selection", ["experts", "data"])
def test_all_slices_with_gates_of_one_are_the_wide_mlp(selection):
    model = model_of(example("union-of-experts", selection=selection, unit=True, active=4))
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        experts = layer.mlp.experts
        gate, up = (half.flatten(0, 1) for half in experts.gate_up_proj.chunk(2, 1))
        dense = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ experts.down_proj.transpose(0, 1).flatten(1).T
        torch.testing.assert_close(layer.mlp(x), dense, atol=1e-6, rtol=1e-5)


def test_a_mixture_that_stays_dense_is_its_dense_layer(tmp_path):
    from moe_prism.model import load_model

    trained(tmp_path / "out", "mote", settings={"dense": 1.0})
    model = load_model(tmp_path / "out")
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        assert torch.equal(layer.mlp(x), layer.mlp.shared_expert(x))
