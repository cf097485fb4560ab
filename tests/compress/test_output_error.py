"""The greedy criterion on a real sample: replay equals running the pruned layer, ids permute with it, protection holds."""

from __future__ import annotations

import pytest
import torch

from moe_prism.calibrate.run import Pass, Settings
from moe_prism.compress.prune import KeptExperts, LayerSubject, criteria, pruned
from moe_prism.errors import UsageError
from moe_prism.methods.prune.output_error import OutputError, _Sample
from moe_prism.model import find_layers

from .tiny import build

IDS = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(4))


def sampled(kind: str, batch: int = 2, capacity: int = 64):
    model = build(kind)
    layers = find_layers(model)
    work = Pass(model, layers, Settings(collectors=("grams",), capacity=capacity, batch=batch))
    work.run(IDS)
    return model, layers, work


def subject(layer, found, protected=None) -> LayerSubject:
    shield = torch.zeros(layer.num_experts, dtype=torch.bool) if protected is None else protected
    return LayerSubject(0, layer.name, layer.num_experts, 2, {"grams": found}, shield)


@pytest.mark.parametrize("kind", ["softmax", "softmax-normalised", "top-k-softmax", "router-bias"])
def test_replayed_weights_are_those_of_the_pruned_router(kind):
    model, layers, work = sampled(kind, capacity=90)
    sample = _Sample(subject(layers[0], work.collectors[0]["grams"].state()))
    kept = (1, 2, 4, 5, 7)
    live = torch.zeros(8, dtype=torch.bool)
    live[list(kept)] = True
    seen: dict = {}

    def note(_module, args, kwargs):
        seen["index"], seen["weight"] = [*args, *kwargs.values()][1:3]

    with pruned(model, [KeptExperts(8, kept), *[KeptExperts(8, tuple(range(8)))] * (len(layers) - 1)]):
        handle = layers[0].module.register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
        handle.remove()
    dense = torch.zeros(IDS.numel(), 8).scatter(1, seen["index"].long(), seen["weight"].float())
    usable = (torch.arange(IDS.numel()) % 16) >= 1
    index, weight = sample.weights(live)
    mine = torch.zeros(len(index), 8).scatter(1, index, weight)
    assert torch.allclose(mine.sort(0).values, dense[usable].sort(0).values, rtol=1e-4, atol=1e-6)  # all 90 usable tokens, by key


def test_sample_does_not_depend_on_batches_and_merges():
    _, layers, one = sampled("softmax", batch=1)
    _, _, three = sampled("softmax", batch=3)
    a, b = one.collectors[0]["grams"].state(), three.collectors[0]["grams"].state()
    assert torch.equal(a["key"], b["key"]) and torch.allclose(a["gram"], b["gram"], rtol=1e-4, atol=1e-7)
    assert len(a["key"]) == 64 and a["key"].tolist() == sorted(a["key"].tolist())
    assert sum(t.nbytes for t in a.values()) <= type(one.collectors[0]["grams"]).bytes_per_layer(layers[0], 64)


def test_the_first_to_go_is_the_one_brute_force_finds():
    _, layers, work = sampled("softmax")
    it = subject(layers[0], work.collectors[0]["grams"].state())
    sample, every = _Sample(it), torch.ones(8, dtype=torch.bool)
    costs = [sample.cost(every, e) for e in range(8)]
    assert int(OutputError().scores(it).argmin()) == costs.index(min(costs))


def test_ids_permute_and_protection_holds():
    _, layers, work = sampled("softmax")
    found, order = work.collectors[0]["grams"].state(), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    plain = criteria.get("output-error")().scores(subject(layers[0], found))
    moved = {
        **found,
        "gram": found["gram"][:, order][:, :, order],
        "scores": found["scores"][:, order],
        "index": order.argsort()[found["index"]],
    }
    mine = criteria.get("output-error")().scores(subject(layers[0], moved))
    assert torch.equal(mine.argsort(), plain[order].argsort()) and torch.allclose(mine, plain[order], rtol=1e-3)
    shield = torch.zeros(8, dtype=torch.bool)
    shield[int(plain.argmin())] = True
    assert int(criteria.get("output-error")().scores(subject(layers[0], found, shield)).argmin()) != int(plain.argmin())


@pytest.mark.parametrize("kind", ["sigmoid-bias", "group-sigmoid"])
def test_routers_that_choose_by_more_than_scores_are_refused(kind):
    _, layers, work = sampled(kind)
    with pytest.raises(UsageError, match="more than its scores"):
        OutputError().scores(subject(layers[0], work.collectors[0]["grams"].state()))
