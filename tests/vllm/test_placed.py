"""Workers with some experts or some layers each, by simulation of ranks. Needs no vLLM, whose CPU build runs neither."""

from __future__ import annotations

import pytest
import torch

from moe_prism.elastic.bind import Step, bind
from moe_prism.point import FULL, OperatingPoint, RoutingStage, SlotRule
from moe_prism.serve.vllm.layer import PackedElastic, PackedWeights
from moe_prism.serve.vllm.placed import Placed
from tests.vllm.test_stripe import D, E, F, K, N, Ranks, batch, shard, side, weights

POINTS = [FULL.with_slots(0.25), FULL.with_slots(0.5), FULL.with_budget(0.6), FULL.with_budget(0.5, "product"),
          OperatingPoint(slots=SlotRule(budget=0.5, rule="first-slot", of="slots")),
          OperatingPoint(routing=(RoutingStage(layers=(2, 1), keep_mass=True),), slots=SlotRule(budget=0.5))]  # fmt: skip
LAYERS = 2


def near(found, wanted):
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def maps(size, dealt):
    """expert_map of every rank: runs of experts, as vLLM deals them, or every n-th."""
    own = [torch.arange(E)[rank::size] if dealt == "round" else torch.arange(E).tensor_split(size)[rank] for rank in range(size)]
    found = torch.full((size, E), -1)
    for rank, experts in enumerate(own):
        found[rank, experts] = torch.arange(len(experts))
    return own, found


def packed(first, down, experts=None, placed=None):
    experts = torch.arange(E) if experts is None else experts
    w13, w2 = shard(first[experts], down[experts], 0, 1)
    return PackedWeights(w13=w13, w2=w2, activation="silu", placed=placed)


def model(held, gates):
    """Two layers; None: another rank runs it."""
    named = [(f"layer {i}", own) for i, own in enumerate(held)]
    return PackedElastic(torch.nn.Module(), named, [side(gates, seed=i + 1) for i in range(LAYERS)], n_sub=N, gates=gates, k=K)


def at(made, point, which=0):
    made.step = Step(bind(made, [point] if which is None or isinstance(which, int) else point), which)
    return made


@pytest.fixture(scope="module")
def layers():
    return [weights(seed) for seed in range(LAYERS)]


@pytest.mark.parametrize("gates", [0, 2])
@pytest.mark.parametrize("dealt", ["runs", "round"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_some_experts_each_are_one_process(layers, size, dealt, gates):
    own, found = maps(size, dealt)
    x, index, weight = batch(13)
    index[0, 1] = -1  # no expert
    alone = model([packed(*layer) for layer in layers], gates)

    def work(share):
        held = [packed(*layer, own[share.rank], Placed(found[share.rank], share.rank, share.gather)) for layer in layers]
        made = model(held, gates)
        kept = []
        for layer in made.layers:
            layer.on_kept = lambda _, keep: kept.append(keep)
        return [[at(made, p).run(i, x, index, weight) for i in range(LAYERS)] for p in POINTS], kept

    ranks = Ranks(size).run(work)
    assert all(torch.equal(a, b) for _, kept in ranks[1:] for a, b in zip(ranks[0][1], kept, strict=True)), (
        "selection is the same"
    )
    for p, point in enumerate(POINTS):
        for i in range(LAYERS):
            near(sum(outputs[p][i] for outputs, _ in ranks), at(alone, point).run(i, x, index, weight))


def test_rows_at_different_points_over_ranks_with_some_experts_each(layers):
    own, found = maps(2, "runs")
    x, index, weight = batch(12)
    which = torch.arange(12) % len(POINTS)
    alone = at(model([packed(*layer) for layer in layers], 0), POINTS, which)

    def work(share):
        held = [packed(*layer, own[share.rank], Placed(found[share.rank], share.rank, share.gather)) for layer in layers]
        return at(model(held, 0), POINTS, which).run(0, x, index, weight)

    near(sum(Ranks(2).run(work)), alone.run(0, x, index, weight))


@pytest.mark.parametrize("gates", [0, 2])
def test_ranks_with_some_layers_each_are_one_process(layers, gates):
    """Budgets over all layers are those of one process, though a rank has the weights of its own only."""
    x, index, weight = batch(9)
    every = [packed(*layer) for layer in layers]
    alone = model(every, gates)
    ranks = [model([own if i == rank else None for i, own in enumerate(every)], gates) for rank in range(LAYERS)]
    for point in POINTS:
        for rank, made in enumerate(ranks):
            assert torch.equal(at(made, point).run(rank, x, index, weight), at(alone, point).run(rank, x, index, weight))
            with pytest.raises(RuntimeError, match="another worker"):
                made.run(1 - rank, x, index, weight)


def test_ranks_with_some_requests_each_send_only_what_is_kept(layers):
    """Data parallelism: a rank chooses for its own tokens, and sends no expert that keeps nothing. Who computes them sees ids of -1."""
    x, index, weight = batch(16)
    alone = model([packed(*layer) for layer in layers], 0)
    for point in POINTS:
        wanted = at(alone, point).run(0, x, index, weight)
        sent = torch.full_like(index, -1)
        keep = torch.zeros(*index.shape, N, dtype=torch.bool)
        for rank in range(2):
            rows = slice(8 * rank, 8 * rank + 8)
            own = at(model([packed(*layer) for layer in layers], 0), point)
            mine = own.layers[0].kept(own.step, x[rows], index[rows], weight[rows])
            width = mine.shape[1]  # a routing stage may leave fewer choices
            keep[rows, :width] = mine
            chosen = own.layers[0].candidates(own.step, x[rows], index[rows], weight[rows], state={}).index
            sent[rows, :width] = chosen.masked_fill(~mine.any(2), -1)
        assert int((sent >= 0).sum()) < index.numel() or point.slots.rule == "threshold"
        both = at(alone, point)
        kept = []
        both.layers[0].on_kept = lambda _, keep, kept=kept: kept.append(keep)
        near(both.run(0, x, index, weight), wanted)
        both.layers[0].on_kept = None
        assert torch.equal(kept[0], keep[:, : kept[0].shape[1]]), "ranks choose what one process does"


def test_shapes_that_are_checked(layers):
    first, down = layers[0]
    own, found = maps(2, "runs")
    held = packed(first, down, own[0], Placed(found[0], 0, lambda t: [t]))
    assert (held.experts, held.adds) == (E, True) and len(held.w2) < E
    assert held.w2.shape[1:] == (D, F)
    assert not packed(first, down, own[1], Placed(found[1], 1, lambda t: [t])).adds
