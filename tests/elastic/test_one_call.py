"""A layer in one compiled call against the parts that it stands for: equal to the last bit, whatever is asked of it."""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic import LayerParts, attach
from moe_prism.elastic.bind import Step, bind
from moe_prism.elastic.control import Past, States
from moe_prism.elastic.execute import batch_products, one_call, tiled
from moe_prism.elastic.execute.memory import InMemory
from moe_prism.elastic.execute.plain import reference
from moe_prism.elastic.rules.threshold import QUANTILES
from moe_prism.kernels import threads
from moe_prism.kernels.requests import follow_at
from moe_prism.kernels.selection import CacheColumns, follow
from moe_prism.model import find_layers
from moe_prism.point import FULL
from tests.parity.families import build

from .test_execute import batch, close
from .test_tiled import arranged

N, K = 4, 2


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Nothing is measured: the tiles compute everything."""
    monkeypatch.setenv("MOE_PRISM_WHOLE", "tiles")


def made(gates=1, compensate=True):
    """An elastic model whose predictor and cutoffs keep some and drop some."""
    model = build("olmoe")
    layers = find_layers(model)
    g = torch.Generator().manual_seed(gates)
    tensors = []
    for layer in layers:
        layer.arrange()
        own = {
            "ridge": torch.randn(layer.num_experts, N, layer.hidden + N * gates + 1, generator=g) * 0.3,
            "cutoffs": torch.linspace(2.0, 0.0, QUANTILES),
            "shares": torch.linspace(0.0, 1.0, QUANTILES),
        }
        if compensate:
            own["compensate.mean.vectors"] = torch.randn(layer.num_experts, N, layer.hidden, generator=g).bfloat16()
        tensors.append(own)
    return attach(model, N, gates=gates, tensors=tensors, layers=layers)


MODELS = {(gates, fix): made(gates, fix) for gates, fix in ((0, True), (1, True), (2, False))}


def point(budget, rule="threshold", control="none", compensate=True):
    slots = replace(FULL.with_budget(budget, rule).slots, control=control, compensate=compensate, of="slots")
    return replace(FULL, slots=slots)


@contextmanager
def in_parts():
    """Every part is called alone."""
    with mock.patch.object(InMemory, "at_once", lambda *_: None), mock.patch.object(one_call, "given", lambda *_: None):
        yield


def past_of(seed, tokens, holds):
    """Requests that had some tokens already, the last of them with two rows."""
    rng, layers = np.random.default_rng(seed), 4
    states = States(2 * tokens + 1, layers)
    states.sums[:tokens] = rng.normal(size=states.sums[:tokens].shape) * 0.3
    states.tokens[:tokens, 0] = rng.integers(1, 50, tokens)
    rows = np.stack([np.arange(tokens), np.arange(tokens) + tokens, holds]).astype(np.int64)
    if tokens > 1:
        rows[0, -1] = rows[1, -2]
    rows[1, rng.random(tokens) < 0.1] = -1
    return Past.of(rows, states, False)


def run(elastic, bound, which, routed, seed, *, watched):
    """(output, kept, states) of the second layer."""
    layer, kept, step = elastic.layers[1], [], Step(bound, which)
    if bound.holds:
        step.past = past_of(seed, len(routed[0]), step.kinds(len(routed[0])))
    layer.on_kept = (lambda index, keep: kept.append(keep)) if watched else None
    try:
        with elastic.at(step):
            out = layer(*routed)
    finally:
        layer.on_kept = None
    states = (step.past.states.sums, step.past.states.tokens) if step.past else ()
    return out, kept[0] if kept else None, states


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "tokens": st.integers(1, 32),
        "model": st.sampled_from(list(MODELS)),
        "kind": st.sampled_from([("threshold", "none"), ("threshold", "mean"), ("threshold", "strict"), ("product", "none")]),
        "compensate": st.booleans(),
        "budgets": st.lists(st.sampled_from([0.3, 0.5, 0.75, 1.0]), min_size=1, max_size=3),
    }
)


@torch.no_grad()
@given(CASES)
@settings(max_examples=60, deadline=None)
def test_one_call_is_its_parts(case):
    elastic, (rule, control) = MODELS[case["model"]], case["kind"]
    x, index, weight, g = batch(elastic.layers[1].parts, case["tokens"], K, case["seed"])
    index[torch.rand(index.shape, generator=g) < 0.1] = -1
    index[torch.rand(index.shape, generator=g) < 0.05] = elastic.layers[1].parts.layer.num_experts
    points = [point(b, rule, control, case["compensate"]) if b < 1 else FULL for b in case["budgets"]]
    bound = bind(elastic, points)
    one = len(points) == 1
    which = 0 if one else torch.randint(len(points), (len(x),), generator=g)
    with in_parts():
        expected = run(elastic, bound, which, (x, index, weight), case["seed"], watched=True)
    found = run(elastic, bound, which, (x, index, weight), case["seed"], watched=True)
    assert (found[1] is None and expected[1] is None) or torch.equal(found[1], expected[1])
    for _ in range(2):  # by the call that was found, then by the one that is kept
        assert torch.equal(found[0], expected[0])
        assert all(np.array_equal(*pair) for pair in zip(found[2], expected[2], strict=True))
        found = run(elastic, bound, which, (x, index, weight), case["seed"], watched=False)
    assert ((1, 0) in bound.again) == one


@torch.no_grad()
def test_it_runs_where_it_should():
    elastic = MODELS[1, True]
    layer, routed = elastic.layers[0], batch(elastic.layers[0].parts, 3, K, 0)[:3]
    before = layer.executor.tally.calls
    with mock.patch.object(InMemory, "settle", lambda *_: pytest.fail("the parts were called")):
        for which in (0, torch.tensor([0, 1, 0])):
            with elastic.at(Step(bind(elastic, [point(0.5), point(0.3)]), which)):
                layer(*routed)
                layer(*routed)
    assert layer.executor.tally.calls == before + 4


@torch.no_grad()
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_what_has_changed_is_seen(budget):
    """Weights that moved, another way, other tensors, a token that has an expert twice, gradients."""
    elastic = made()
    layer, (x, index, weight, _) = elastic.layers[0], batch(elastic.layers[0].parts, 3, K, 0)
    elastic_at = Step(bind(elastic, [point(budget)]))

    def check():
        with elastic.at(elastic_at):
            found = layer(x, index, weight)
            with in_parts(), mock.patch.dict(elastic_at.bound.again, clear=True):
                assert torch.equal(found, layer(x, index, weight))
        return found

    first = check()
    module = layer.parts.layer.module
    module.down_proj.data = (2 * module.down_proj.data.transpose(1, 2)).contiguous().transpose(1, 2)
    assert not torch.equal(check(), first)
    layer.executor.way = "reference"
    never = mock.Mock(side_effect=AssertionError("another way was asked for"))
    with mock.patch.object(one_call.Ready, "output", never), mock.patch.object(one_call.LayerCall, "__call__", never):
        close(run_at(layer, elastic_at, x, index, weight), check())
    layer.executor.way = "auto"
    layer.parts.tensors["cutoffs"] = torch.linspace(9.0, 0.0, QUANTILES)
    layer.forget()
    check()
    index = torch.zeros_like(index)
    check()
    x = torch.randn(6, 2 * x.shape[1])[::2, : x.shape[1]]
    index, weight = torch.tensor([[0, 1]] * 6)[::2], torch.ones(3, 2 * K)[:, :K]
    check()
    with torch.enable_grad():
        x.requires_grad_()
        with elastic.at(elastic_at):
            assert layer(x, index, weight).requires_grad


def run_at(layer, step, *routed):
    with layer.elastic.at(step):
        return layer(*routed)


@torch.no_grad()
def test_a_token_that_has_an_expert_twice_moves_no_state():
    elastic = MODELS[1, True]
    x, index, weight, _ = batch(elastic.layers[1].parts, 3, K, 0)
    index[1] = index[1, 0]
    bound = bind(elastic, [point(0.5, control="mean")])
    with in_parts():
        expected = run(elastic, bound, 0, (x, index, weight), 1, watched=True)
    found = run(elastic, bound, 0, (x, index, weight), 1, watched=True)
    assert torch.equal(found[0], expected[0])
    assert all(np.array_equal(*pair) for pair in zip(found[2], expected[2], strict=True))


@torch.no_grad()
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 32), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=20, deadline=None)
def test_given_slots_are_those_of_the_tiles_and_of_the_reference(seed, tokens, dtype):
    parts = PARTS[dtype]
    x, index, weight, g = batch(parts, tokens, K, seed)
    keep = torch.rand(tokens, K, N, generator=g) < 0.6
    found = one_call.given(parts, x, index, weight, keep)
    with in_parts():
        assert torch.equal(found, tiled.tiled(parts, x, index, weight, keep))
    if dtype == torch.float32:
        close(found, reference(parts, x, index, weight, keep))
    every = one_call.given(parts, x, index, weight, None)
    assert torch.equal(every, one_call.given(parts, x, index, weight, torch.ones_like(keep)))


def parts_of(dtype):
    layer = arranged("olmoe")
    layer.module.to(dtype)
    return LayerParts(layer, N, 0)


PARTS = {dtype: parts_of(dtype) for dtype in (torch.float32, torch.bfloat16)}


@torch.no_grad()
def test_threads_change_no_bit(monkeypatch):
    elastic = made()
    parts = elastic.layers[1].parts
    x, index, weight, _ = batch(parts, 16, K, 0)
    bound, before = bind(elastic, [point(0.5)]), torch.get_num_threads()
    torch.set_num_threads(1)
    alone = run(elastic, bound, 0, (x, index, weight), 0, watched=True)
    monkeypatch.setattr(threads, "ONE_THREAD_WORK", 0)
    parts.ready = None
    torch.set_num_threads(2)
    try:
        together = run(elastic, bound, 0, (x, index, weight), 0, watched=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], together[0])


@pytest.mark.parametrize("family", ["gpt_oss", "aria", "nemotron_h"])
def test_layers_of_another_kind_are_left_to_the_parts(family):
    """Biases and its own gating, transposed, and no gate: the second can be taken, since it is silu(gate) x up."""
    parts = LayerParts(arranged(family), N, 0)
    x, index, weight, _ = batch(parts, 2, K, 0)
    with torch.no_grad():
        found = one_call.given(parts, x, index, weight, None)
    assert (found is not None) == (family == "aria")
    assert parts.layer.is_silu == (family == "aria")


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 9), width=st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_the_activation_is_torchs_and_the_same_wherever_a_value_lies(seed, rows, width):
    layer = PARTS[torch.float32].layer
    g = torch.Generator().manual_seed(seed)
    pre = torch.randn(rows, 2 * width, generator=g) * 10 ** torch.randint(-3, 3, (1, 1), generator=g)
    factor, choice = torch.rand(rows + 3, generator=g), torch.randint(rows + 3, (rows,), generator=g)
    found = batch_products.activated(layer, pre, factor, choice)
    expected = torch.nn.functional.silu(pre[:, :width]) * pre[:, width:] * factor[choice, None]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-30)
    each = torch.stack([pre[:, :width].reshape(-1), pre[:, width:].reshape(-1)], 1)
    alone = batch_products.activated(layer, each.contiguous()).reshape(rows, width)
    assert torch.equal(batch_products.activated(layer, pre), alone)


def test_what_is_not_a_number_stays_none():
    layer = PARTS[torch.float32].layer
    pre = torch.tensor([[float("nan"), float("inf"), -1e30, 1.0, 1.0, 1.0]])
    found = batch_products.activated(layer, pre)[0]
    assert found[0].isnan() and found[1] == float("inf") and found[2].abs() < 1e-6


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4), tokens=st.integers(1, 5), length=st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_rows_followed_by_address_are_those_followed_as_arrays(seed, rows, tokens, length):
    rng, wide, layers = np.random.default_rng(seed), 12, 2
    states = States(rows * wide, layers)
    states.sums[:] = rng.random(states.sums.shape)
    real, last = rng.random((rows, wide)) < 0.5, rng.integers(-1, length, rows) if length else np.full(rows, -1)
    kinds = rng.integers(0, 2, rows * tokens)
    mask = rng.integers(0, 2, (rows, tokens + length)) if seed % 2 else np.zeros((0, 0), np.int64)
    positions = rng.integers(0, 2, (1 if seed % 3 else rows, tokens)) if seed % 5 else np.zeros((0, 0), np.int64)

    def arrays():
        return real.copy(), last.astype(np.int64), states.sums.copy(), states.tokens.copy()

    mine, theirs, found, expected = arrays(), arrays(), *np.empty((2, 3, rows * tokens), np.int64)
    follow(CacheColumns(*theirs), length, kinds, mask, positions, expected)
    record = np.array([*(a.ctypes.data for a in mine), rows, wide, layers], np.int64)
    masked, placed = (mask.ctypes.data, mask.shape[1]), (positions.ctypes.data, len(positions))
    follow_at(record.ctypes.data, length, tokens, kinds.ctypes.data, *masked, *placed, found.ctypes.data)
    assert np.array_equal(found, expected)
    assert all(np.array_equal(*pair) for pair in zip(mine, theirs, strict=True))
