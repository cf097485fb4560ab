"""Mask mode and physical removal against each other, and against the routing formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_prism.checkpoint import Journal, LayerStream, OutputFolder
from moe_prism.compress.prune import KeptExperts, PruneRequest, choose, pruned
from moe_prism.compress.prune.remove import remove_experts
from moe_prism.errors import UsageError
from moe_prism.model import find_layers
from moe_prism.model.router import Router, RoutingGroups, find_routers
from tests.tiers import by_night

from .tiny import FAMILIES, build, load, logits, relative, save


def choices_of(model, keep: float, groups: str = "per_group", seed: int = 0) -> list[KeptExperts]:
    layers = find_layers(model)
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(layer.num_experts, generator=generator) for layer in layers]
    none = [torch.zeros(layer.num_experts, dtype=torch.bool) for layer in layers]
    return choose(scores, PruneRequest(keep, groups=groups), 2, none, [Router(model, layer).groups for layer in layers])


def write(source, out, choices) -> None:
    stream = LayerStream(source)
    with OutputFolder(out) as folder:
        remove_experts(stream, find_layers(stream.model), choices, folder, Journal(folder.work, {}))
        folder.finish()


@pytest.mark.parametrize("kind", FAMILIES)
def test_mask_and_removal_give_the_same_logits(kind, tmp_path):
    model = save(kind, tmp_path / "source")
    before = logits(model)
    choices = choices_of(model, 0.5)
    with pruned(model, choices):
        masked = logits(model)
    assert torch.equal(logits(model), before)  # the model is as it was
    assert relative(masked, before) > 0.01  # else this would prove nothing
    write(tmp_path / "source", tmp_path / "out", choices)
    smaller = load(tmp_path / "out")
    assert [layer.num_experts for layer in find_layers(smaller)] == [len(c.kept) for c in choices]
    assert relative(logits(smaller), masked) < 1e-5


@pytest.mark.parametrize(("kind", "mode", "keep"), by_night([
    ("group-sigmoid", "regroup", 0.5), ("group-sigmoid", "drop_groups", 0.5), ("group-sigmoid", "drop_groups", 0.75),
    ("group-softmax", "regroup", 0.5), ("group-softmax", "drop_groups", 0.75),
], ("group-sigmoid", "regroup", 0.5), ("group-softmax", "drop_groups", 0.75)))  # fmt: skip
def test_other_group_modes_are_removable_too(kind, mode, keep, tmp_path):
    model = save(kind, tmp_path / "source")
    choices = choices_of(model, keep, mode)
    with pruned(model, choices):
        masked = logits(model)
    write(tmp_path / "source", tmp_path / "out", choices)
    assert relative(logits(load(tmp_path / "out")), masked) < 1e-5


def test_unequal_groups_run_in_mask_mode_only(tmp_path):
    for kind in ("group-sigmoid", "group-softmax"):
        model = save(kind, tmp_path / kind)
        choices = choices_of(model, 0.625, "mask", seed=1)
        router = find_routers(model, find_layers(model))[0]
        x = torch.randn(40, router.layer.hidden, generator=torch.Generator().manual_seed(2))
        before = logits(model)
        with pruned(model, choices):
            index, _ = router.route(x)
            assert relative(logits(model), before) > 0.01
        assert set(index.flatten().tolist()) <= set(choices[0].kept)
        assert torch.equal(logits(model), before)
        with pytest.raises(UsageError, match="mask"):
            write(tmp_path / kind, tmp_path / f"{kind}-out", choices)
        assert not (tmp_path / f"{kind}-out").exists()


def test_equal_groups_masked_are_what_sliced_ones_are():
    for kind in ("group-sigmoid", "group-softmax"):
        model = build(kind)
        choices = choices_of(model, 0.5)
        with pruned(model, choices):
            sliced = logits(model)
        with pruned(model, [KeptExperts(c.experts, c.kept, c.groups, masked=True) for c in choices]):
            assert relative(logits(model), sliced) < 1e-5


def formula(kind: str, z: Tensor, bias: Tensor, dead: Tensor, groups: int = 4, limit: int = 2) -> Tensor:
    """Routing weights [T, E] of logits z with the dead experts at minus infinity, written out per kind."""
    z = z.masked_fill(dead, -torch.inf)
    if kind in ("softmax", "softmax-normalised", "top-k-softmax", "group-softmax", "router-bias"):
        p = z.softmax(-1)
        allowed = ~dead.expand_as(p)
        if kind == "group-softmax":
            best = p.reshape(len(p), groups, -1).amax(-1).topk(limit).indices
            allowed = torch.zeros(len(p), groups).scatter(1, best, 1).repeat_interleave(p.shape[1] // groups, 1).bool() & allowed
        top = p.masked_fill(~allowed, -1).topk(2)
        weight = top.values if kind in ("softmax", "group-softmax") else top.values / top.values.sum(-1, keepdim=True)
        return torch.zeros_like(p).scatter(1, top.indices, weight)
    p = z.sigmoid()
    choice = (p + bias).masked_fill(dead, -torch.inf)
    if kind == "group-sigmoid":
        best = choice.reshape(len(p), groups, -1).topk(2).values.sum(-1).topk(limit).indices
        allowed = torch.zeros(len(p), groups).scatter(1, best, 1).repeat_interleave(p.shape[1] // groups, 1).bool()
        choice = choice.masked_fill(~allowed, -torch.inf)
    index = choice.topk(2).indices
    weight = p.gather(1, index)
    return torch.zeros_like(p).scatter(1, index, weight / weight.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_routing_among_the_kept_is_the_formula(kind):
    model = build(kind)
    layer = find_layers(model)[0]
    router = Router(model, layer)
    gate = router.roots[0]
    x = torch.randn(50, layer.hidden, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        z = x @ gate.weight.T + (gate.bias if kind == "router-bias" else 0)
    choice = choices_of(model, 0.5)[0]
    dead = torch.ones(layer.num_experts, dtype=torch.bool)
    dead[list(choice.kept)] = False
    with router.sliced(choice.kept, choice.groups):
        found = router._dense(x)
    scale = getattr(model.config, "routed_scaling_factor", 1.0) if "n_routed_experts" in model.config.to_dict() else 1.0
    bias = getattr(gate, "e_score_correction_bias", torch.zeros(layer.num_experts))
    assert relative(found, scale * formula(kind, z, bias, dead)) < 1e-5


@pytest.mark.parametrize("kind", FAMILIES)
def test_keeping_everything_does_nothing(kind, tmp_path):
    model = save(kind, tmp_path / "source")
    before = logits(model)
    choices = choices_of(model, 1.0)
    with pruned(model, choices):
        assert torch.equal(logits(model), before)
    write(tmp_path / "source", tmp_path / "out", choices)
    assert torch.equal(logits(load(tmp_path / "out")), before)


def test_elastic_execution_runs_among_the_kept():
    from moe_prism.elastic import attach, operating_point

    model = build("softmax")
    choices = choices_of(model, 0.5)
    with pruned(model, choices):
        wanted = logits(model)
    elastic = attach(model, 4)
    elastic.always_split = True
    with pruned(model, choices), operating_point(model, 1.0, rule="linear"):
        assert relative(logits(model), wanted) < 1e-5


def test_a_router_that_depends_on_the_order_is_refused():
    model = build("softmax")
    layer = find_layers(model)[0]
    gate = Router(model, layer).roots[0]
    forward = gate.forward

    def ordered(x):
        scores, weight, index = forward(x)
        return scores, weight, (index + 1) % 8

    gate.forward = ordered
    with pytest.raises(UsageError, match="order"):
        Router(model, layer).check()


def test_layers_with_different_counts_are_mask_mode_only(tmp_path):
    model = save("softmax", tmp_path / "source")
    choices = [KeptExperts(8, (0, 1, 2)), KeptExperts(8, (3, 4, 5, 6))]
    with pruned(model, choices):
        logits(model)
    with pytest.raises(UsageError, match="one number"):
        write(tmp_path / "source", tmp_path / "out", choices)


def test_groups_found_where_they_matter():
    for kind, groups in (
        ("group-sigmoid", RoutingGroups(4, 2, 2)),
        ("group-softmax", RoutingGroups(4, 2, 1)),
        ("sigmoid-bias", None),
    ):
        model = build(kind)
        assert Router(model, find_layers(model)[0]).groups == groups


def test_dense_models_are_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    from .tiny import BASE

    sizes = {k: v for k, v in BASE.items() if "moe" not in k and "experts" not in k}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    with pytest.raises(UsageError, match="dense"):
        find_routers(model, find_layers(model))
