"""The pass and its collectors, against brute force."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.calibrate import RoutedBatch, collectors
from moe_prism.calibrate.counts import ChoiceCounts
from moe_prism.calibrate.run import Pass, Settings, bounded_capacity
from moe_prism.calibrate.statistics import LayerStatistics
from moe_prism.calibrate.tokens import TokenReservoir, token_keys
from moe_prism.errors import CorruptError, DoesNotFit
from moe_prism.model import find_layers
from tests.parity.families import build

E, K, D, WINDOW = 5, 2, 3, 7
LAYER = SimpleNamespace(num_experts=E, hidden=D, width=4, index=2, name="layer")


def tokens(count, seed=0):
    """x [T, D], index [T, K] with some choices that are no expert, weight [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(E + 1, generator=generator)[:K] for _ in range(count)])
    return torch.randn(count, D, generator=generator), index, torch.rand(count, K, generator=generator)


def feed(collector, data, sizes):
    x, index, weight = data
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        collector.update(RoutedBatch(x[part], index[part], weight[part], start, WINDOW))
        start += size
    return collector


def brute_force(data, expert, capacity, seed):
    """Of all tokens that chose the expert, first tokens of windows aside, those with the smallest keys, in order of key."""
    x, index, weight = data
    keys = token_keys(torch.arange(len(x)).numpy(), seed, LAYER.index).tolist()
    rows = [t for t in range(len(x)) if t % WINDOW and expert in index[t].tolist()]
    rows = sorted(rows, key=lambda t: keys[t])[:capacity]
    chosen = [index[t].tolist().index(expert) for t in rows]
    return [keys[t] for t in rows], x[rows].half(), torch.tensor([float(weight[t, c]) for t, c in zip(rows, chosen, strict=True)])


@settings(max_examples=25, deadline=None)
@given(windows=st.lists(st.integers(1, 9), min_size=1, max_size=6), capacity=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_reservoir_is_the_bottom_k_of_all_keys(windows, capacity, seed):
    data = tokens(sum(windows) * WINDOW, seed)
    reservoir = feed(TokenReservoir(LAYER, capacity=capacity, seed=seed), data, [n * WINDOW for n in windows])
    for expert in range(E):
        keys, x, weight = brute_force(data, expert, capacity, seed)
        kept = int(reservoir.kept[expert])
        assert kept == len(keys) and reservoir.key[expert, :kept].tolist() == keys
        assert torch.equal(reservoir.x[expert, :kept], x)
        torch.testing.assert_close(reservoir.weight[expert, :kept], weight)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", [TokenReservoir, ChoiceCounts])
def test_batches_do_not_matter_and_a_restored_state_goes_on_bit_identically(kind):
    data = tokens(40 * WINDOW)
    make = lambda: kind(LAYER, capacity=20, seed=3)  # noqa: E731
    whole = feed(make(), data, [40 * WINDOW]).state()
    if kind is TokenReservoir:  # a sum of floats may round otherwise in other batches
        assert same(feed(make(), data, [WINDOW] * 40).state(), whole)
    sizes = [8 * WINDOW] * 5
    straight = feed(make(), data, sizes)
    half = feed(make(), data, sizes[:2])
    restored = make()
    restored.load({k: v.clone() for k, v in half.state().items()})
    x, index, weight = data
    for start in range(16 * WINDOW, 40 * WINDOW, 8 * WINDOW):
        part = slice(start, start + 8 * WINDOW)
        restored.update(RoutedBatch(x[part], index[part], weight[part], start, WINDOW))
    assert same(restored.state(), straight.state())


def test_a_restored_state_is_its_own():
    data = tokens(10 * WINDOW)
    first = feed(TokenReservoir(LAYER, capacity=8, seed=0), data, [10 * WINDOW])
    before = {k: v.clone() for k, v in first.state().items()}
    second = TokenReservoir(LAYER, capacity=8, seed=0)
    second.load(first.state())
    second.update(RoutedBatch(*tokens(10 * WINDOW, 1), 10 * WINDOW, WINDOW))
    assert same(first.state(), before)


def test_first_tokens_of_windows_are_left_out():
    x = torch.arange(4 * WINDOW * D).reshape(-1, D).float()
    index, weight = torch.zeros(len(x), 1, dtype=torch.long), torch.ones(len(x), 1)
    reservoir = feed(TokenReservoir(LAYER, capacity=99, seed=0), (x, index, weight), [len(x)])
    rows = (reservoir.x[0, : int(reservoir.kept[0]), 0].float() / D).int().tolist()
    assert sorted(rows) == [t for t in range(len(x)) if t % WINDOW]


def test_counts_equal_brute_force():
    x, index, weight = data = tokens(30 * WINDOW)
    counts = feed(ChoiceCounts(LAYER, capacity=1, seed=0), data, [10 * WINDOW] * 3)
    for expert in range(E):
        hit = index == expert
        assert int(counts.count[expert]) == int(hit.sum())
        torch.testing.assert_close(counts.weight_sum[expert], weight[hit].double().sum())
    assert int(counts.tokens) == len(x)


def test_the_sample_is_uniform_over_the_text():
    total, capacity = 4000, 400
    keys = token_keys(torch.arange(total).numpy(), 5, 0)
    assert len(keys.unique()) == total and bool((keys >= 0).all())
    chosen = keys.argsort()[:capacity]
    parts = torch.bincount(chosen * 10 // total, minlength=10)
    assert int(parts.min()) > 20 and int(parts.max()) < 60  # 40 expected in every tenth


@pytest.mark.parametrize(
    "name", [n for n in collectors.names() if n not in ("outputs", "means", "neurons", "gradients")]
)  # they run experts
@pytest.mark.parametrize("capacity", [1, 64, 300])
def test_declared_memory_is_what_is_held(name, capacity):
    collector = collectors.get(name)(LAYER, capacity=capacity, seed=0)
    feed(collector, tokens(20 * WINDOW), [20 * WINDOW])
    held, declared = sum(t.nbytes for t in collector.state().values()), collector.bytes_per_layer(LAYER, capacity)
    assert held == declared or (name == "grams" and held < declared)  # its sample grows with the tokens


def test_the_reservoir_shrinks_to_the_memory_it_is_given():
    layers = [LAYER, LAYER]

    def declared(capacity):
        return sum(collectors.get(n).bytes_per_layer(LAYER, capacity) for n in ("counts", "tokens")) * len(layers)

    assert bounded_capacity(layers, Settings(capacity=500, memory_bytes=declared(500))) == 500
    for limit in (declared(499), declared(200), declared(64)):
        capacity = bounded_capacity(layers, Settings(capacity=500, memory_bytes=limit))
        assert 64 <= capacity < 500 and declared(capacity) <= limit
    with pytest.raises(DoesNotFit, match="64 tokens per expert need") as raised:
        bounded_capacity(layers, Settings(capacity=500, memory_bytes=declared(64) - 1))
    assert "--memory-mib" in raised.value.next_step  # the option as the command spells it


@pytest.fixture(scope="module")
def model():
    return build("olmoe")


def windows(count=12, length=8):
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(1))


def run_pass(model, ids, batch=4, limit=None):
    work = Pass(model, find_layers(model), Settings(capacity=32, batch=batch))
    work.run(ids[:limit])
    return work


@torch.no_grad()
def test_the_pass_sees_what_the_router_chose_and_changes_nothing(model):
    ids = windows()
    before = model(ids).logits
    work = run_pass(model, ids)
    assert torch.equal(model(ids).logits, before)
    for layer in work.statistics().layers:
        counts = layer.values["counts"]
        assert int(counts["count"].sum()) == ids.numel() * 2 and int(counts["tokens"]) == ids.numel()


def test_an_interrupted_pass_continues_bit_identically(model):
    ids = windows()
    whole, half = run_pass(model, ids), run_pass(model, ids, limit=8)
    resumed = Pass(model, find_layers(model), Settings(capacity=32, batch=4))
    resumed.load({k: v.clone() for k, v in half.state().items()})
    assert resumed.done == 8
    resumed.run(ids)
    assert same(resumed.state(), whole.state())


def test_statistics_survive_their_flat_form(model):
    layer = run_pass(model, windows()).statistics().layers[0]
    again = LayerStatistics.unflat(layer.name, layer.flat())
    assert all(same(again.values[c], layer.values[c]) for c in layer.values) and again.kept() == layer.kept()
    x, weight = again.inputs(0)
    assert x.dtype == torch.float32 and len(x) == len(weight) == again.kept()[0]


def test_f08_a_value_that_is_not_finite_stops_the_pass_and_takes_the_hooks_off(model):
    ids, first = windows(), find_layers(model)[0]
    broken = build("olmoe")
    with torch.no_grad():
        broken.get_input_embeddings().weight[int(ids[0, 3])] = float("nan")
    with pytest.raises(CorruptError, match="non-finite input at"):
        run_pass(broken, ids)
    assert "_moe_prism_function" not in find_layers(broken)[0].module.__dict__ and first.name
